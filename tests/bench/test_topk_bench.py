"""`nogemm bench topk` on short rows: cases, checks that refuse, its table, its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nogemm import cli
from nogemm.bench.contenders import topk as contenders
from nogemm.bench.contenders.topk import PATTERNS, TopkContender, rows_of
from nogemm.bench.report.data import read_results
from nogemm.bench.report.tables import topk_table
from nogemm.bench.topk import TopkArgs, run_topk_bench, winners
from nogemm.errors import ConfigError

SETTINGS = {"recall": 0.9, "dtype": "fp32", "seed": 0}
CASE = {"n": 4096, "k": 20, "batch": 2, "threads": 1, "pattern": "normal"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_POOL", 1 << 14)


def test_rows_are_verified_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "topk.json"
    options = "--n 2048 --k 5%,9 --batch 3 --threads 1 --rounds 7 --seconds 0.0005 --recall 0.9"
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "topk", *options.split(), "--json", str(file)])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "nogemm-approximate" in said
    (table,) = read_results([file]).tables
    assert len(table.rows) == 2 * 4
    assert all(len(row) == len(table.head) for row in table.rows)
    exact = [row for row in table.rows if row[0] == "nogemm-exact"]
    assert [row[3] for row in exact] == ["102", "9"]
    assert all(float(row[6]) > 0 for row in table.rows)


@pytest.mark.parametrize("engine", [contenders.EXACT, contenders.APPROXIMATE, contenders.TORCH, contenders.NUMPY])
def test_every_pattern_is_answered(engine: str, short: None) -> None:
    for pattern in PATTERNS:
        facts = TopkContender(SETTINGS | {"engine": engine}).prepare(CASE | {"pattern": pattern})
        assert facts["verified"], (pattern, facts)
        assert rows_of(pattern, 2, 4096, 20, 0).shape == (2, 4096)


@pytest.mark.parametrize("engine", [contenders.EXACT, contenders.TORCH])
def test_a_wrong_answer_has_no_time(engine: str, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = TopkContender.run

    def wrong(self: TopkContender, inputs: torch.Tensor) -> Any:
        values, indices = right(self, inputs)
        return values, indices.roll(1, -1)

    monkeypatch.setattr(TopkContender, "run", wrong)
    facts = TopkContender(SETTINGS | {"engine": engine}).prepare(CASE)
    assert not facts["verified"]
    assert "stable sort" in facts["error"]


def test_a_recall_that_is_not_the_promised_one_has_no_time(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = TopkContender(SETTINGS | {"engine": contenders.APPROXIMATE}).prepare(CASE)
    assert facts["verified"]
    assert facts["promised"] == 0.9
    monkeypatch.setattr(contenders, "expected_recall", lambda *args: 0.5)
    facts = TopkContender(SETTINGS | {"engine": contenders.APPROXIMATE}).prepare(CASE)
    assert "expected 0.5" in facts["error"]


def test_bad_input_is_named() -> None:
    assert winners("5%", 1000) == 50
    for args, said in (
        (TopkArgs(dtype="int3"), "--dtype must be one of fp32, bf16, fp16, got 'int3'"),
        (TopkArgs(recall=1.5), "--recall"),
        (TopkArgs(pattern=("odd",)), "--pattern: unknown 'odd'"),
        (TopkArgs(k=("many",)), "got 'many'"),
        (TopkArgs(k=("9000",), n=(8192,)), "9000 of 8192"),
    ):
        with pytest.raises(ConfigError, match=said):
            run_topk_bench(args)


def test_a_row_without_a_time_says_why() -> None:
    row = CASE | {"contender": "nogemm-exact", "verified": False, "error": "does not match a stable sort"}
    table = topk_table({"rows": [row], "settings": SETTINGS})
    assert "stable sort" in table.rows[0][6]
