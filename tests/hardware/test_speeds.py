"""What a machine's measured speeds say, how they are kept, and that a damaged file is measured again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nogemm import ops
from nogemm.hardware import speeds as module
from nogemm.hardware.speeds import Speeds, between, cache_file, measure_speeds, speeds

KNOWN = Speeds(
    cores=2,
    product_ns={1: 100.0, 100: 20.0},
    rows_ns={"fp32": {1: 50.0}, "bf16": {1: 25.0}, "int8": {1: 10.0, 16: 20.0}},
    widen_ns={"bf16": 300.0, "int8": 500.0},
    call_us=4.0,
)


def test_estimates_follow_the_tables() -> None:
    # One token, 2,000 numbers: 2 thousands of 100 ns; ten tokens lie half way (in log N) between 100 and 20 ns.
    assert KNOWN.product(1, 2_000) == pytest.approx(0.2)
    assert KNOWN.product(10, 2_000) == pytest.approx(10 * 2 * 60e-3)
    assert KNOWN.product(10_000, 2_000) == pytest.approx(10_000 * 2 * 20e-3)
    assert KNOWN.rows("int8", 4, 8_000) == pytest.approx(4.0 + 8 * 15e-3)
    assert KNOWN.widen("bf16", 10_000) == pytest.approx(3.0)
    assert KNOWN.widen("fp32", 10_000) == 0.0


def test_between_stays_inside_the_table() -> None:
    table = {4: 8.0, 1: 2.0, 16: 3.0}
    assert [between(table, n) for n in (0, 1, 2, 4, 16, 500)] == pytest.approx([2.0, 2.0, 5.0, 8.0, 3.0, 3.0])
    assert between({8: 7.0}, 100) == 7.0


def test_break_even_is_where_both_cost_the_same() -> None:
    share = KNOWN.break_even("fp32", 100)
    assert share == pytest.approx(0.4)
    dense = KNOWN.widen("fp32", 1e6) + KNOWN.product(100, 1e6)
    assert KNOWN.rows("fp32", 100, 100 * share * 1e6) - KNOWN.call_us == pytest.approx(dense)
    assert KNOWN.break_even("int8", 1) == 1.0


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("NOGEMM_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "_GIVEN", [])  # what all other tests are given
    module._speeds_of.cache_clear()
    yield tmp_path
    module._speeds_of.cache_clear()


def test_measured_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured() -> Speeds:
        calls.append(1)
        return KNOWN

    monkeypatch.setattr(module, "measure_speeds", measured)
    assert speeds() == KNOWN
    assert speeds() == KNOWN
    module._speeds_of.cache_clear()  # another process
    assert speeds() == KNOWN
    assert len(calls) == 1
    assert [file.name for file in folder.iterdir()] == [cache_file(ops.isa()).name]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "not json",
        json.dumps(KNOWN.to_dict() | {"call_us": -1.0}),
        json.dumps(KNOWN.to_dict() | {"product_ns": {}}),
        json.dumps(KNOWN.to_dict() | {"rows_ns": {"fp32": {"1": 3.0}}}),
        json.dumps(KNOWN.to_dict() | {"widen_ns": {"bf16": "fast"}}),
    ],
)
def test_a_damaged_file_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(module, "measure_speeds", lambda: KNOWN)
    file = cache_file(ops.isa())
    file.write_text(text)
    assert speeds() == KNOWN
    assert Speeds.from_dict(json.loads(file.read_text())) == KNOWN


def test_a_folder_that_cannot_be_made_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure_speeds", lambda: KNOWN)
    (folder / "file").write_text("")
    monkeypatch.setenv("NOGEMM_CACHE", str(folder / "file" / "below"))
    assert speeds() == KNOWN


def test_other_instruction_sets_and_versions_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {cache_file("avx2"), cache_file("scalar")}
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert len(names | {cache_file("avx2")}) == 3


def test_a_measurement_gives_positive_numbers_and_keeps_the_threads() -> None:
    torch.set_num_threads(1)
    found = measure_speeds()
    assert torch.get_num_threads() == 1
    assert Speeds.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert 0 < found.break_even("fp32", 1024) <= 1
