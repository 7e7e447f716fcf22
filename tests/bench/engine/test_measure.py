"""The timing rules: one runs at a time, wrong output has no time, failures become rows."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import fake_contenders
from nogemm.bench.engine import measure as engine
from nogemm.bench.engine.measure import Plan, Spec, add_ratios, measure, summary
from nogemm.bench.engine.row import Row
from nogemm.bench.engine.worker import time_calls

HERE = Path(fake_contenders.__file__).parent


@pytest.fixture
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def fake(name: str, kind: str, log: Path, **settings: Any) -> Spec:
    settings = {"seconds": 0.002, "log": str(log), "name": name} | settings
    return Spec(name=name, factory=f"fake_contenders:{kind}", settings=settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Row], list[str]]:
    log = tmp_path_factory.mktemp("measure") / "log"
    specs = [
        fake("ours", "Sleeper", log),
        fake("slow", "Sleeper", log, seconds=0.03),
        fake("stack", "Sleeper", log, seconds=0.03, layers=1000),
        fake("wrong", "Wrong", log),
        fake("raises", "Raises", log),
        fake("dies", "Dies", log),
        Spec(name="absent", factory="nowhere:Nothing", missing="pip install absent"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        rows = measure(specs, [{"batch": 4}], Plan(threads=1, seconds=0.02, max_calls=3, patience=120))
    add_ratios(rows, "ours", ["batch"])
    return {row["contender"]: row for row in rows}, log.read_text().splitlines()


def test_ratio_is_their_median_over_ours(run: tuple[dict[str, Any], list[str]]) -> None:
    rows, _ = run
    assert rows["ours"]["ratio"] == 1.0
    assert rows["slow"]["ratio"] == rows["slow"]["us_median"] / rows["ours"]["us_median"]
    assert rows["slow"]["ratio"] > 1.5
    assert rows["ours"]["us_p10"] <= rows["ours"]["us_median"] <= rows["ours"]["us_p90"]


def test_a_stack_is_timed_per_layer(run: tuple[dict[str, Any], list[str]]) -> None:
    assert run[0]["stack"]["us_median"] < 0.1 * run[0]["slow"]["us_median"]


def test_no_number_without_a_match(run: tuple[dict[str, Any], list[str]]) -> None:
    wrong = run[0]["wrong"]
    assert wrong["verified"] is False
    assert wrong["max_error"] == 3.0
    assert wrong["ratio"] is None
    assert "us_median" not in wrong
    assert not any(line.startswith("wrong") for line in run[1])


def test_failures_and_absences_are_rows(run: tuple[dict[str, Any], list[str]]) -> None:
    rows, _ = run
    assert rows["raises"]["error"] == "RuntimeError: no such kernel"
    assert "ended with code 3" in rows["dies"]["error"]
    assert rows["dies"]["verified"] is False
    assert "us_median" not in rows["dies"]
    assert rows["absent"]["missing"] == "pip install absent"
    assert rows["absent"]["verified"] is False


def test_one_runs_at_a_time_and_all_alike(run: tuple[dict[str, Any], list[str]]) -> None:
    rows, log = run
    spans = sorted((int(start), int(end)) for _, start, end in map(str.split, log))
    assert all(end <= following for (_, end), (following, _) in itertools.pairwise(spans))
    assert {rows[name]["wait"] for name in ("ours", "slow")} == {"passive"}
    assert {rows[name]["torch_threads"] for name in ("ours", "slow")} == {1}


def test_turns_alternate(run: tuple[dict[str, Any], list[str]]) -> None:
    names = [line.split()[0] for line in run[1] if not line.startswith("dies")]
    turns = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
    # Seven rounds of three; where the order turns, one contender may end a round and begin the next.
    assert len(turns) >= 7 * 3 - 7
    assert {"ours", "slow", "stack"} == set(turns)


@pytest.mark.usefixtures("_importable")
def test_a_silent_worker_is_ended(tmp_path: Path) -> None:
    (row,) = measure([fake("silent", "Silent", tmp_path / "log")], [{}], Plan(threads=1, patience=1.0))
    assert row["error"] == "no answer within 1 s"


def test_few_rounds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_TRIALS", [])  # as outside of tests
    with pytest.raises(ValueError, match="at least 7 rounds"):
        measure([], [], Plan(threads=1, rounds=6))


def test_summary_is_median_and_tenths() -> None:
    assert summary(range(101)) == {"us_median": 50.0, "us_p10": 10.0, "us_p90": 90.0}


def test_ratios_compare_within_a_case_only() -> None:
    rows: list[Row] = [
        {"contender": "ours", "batch": 1, "us_median": 2.0},
        {"contender": "peer", "batch": 1, "us_median": 6.0},
        {"contender": "ours", "batch": 8},
        {"contender": "peer", "batch": 8, "us_median": 6.0},
    ]
    add_ratios(rows, "ours", ["batch"])
    assert [row["ratio"] for row in rows] == [1.0, 3.0, None, None]


class _Counter:
    def __init__(self) -> None:
        self.drawn = self.ran = 0

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        return {}

    def draw(self) -> int:
        self.drawn += 1
        return self.drawn

    def run(self, inputs: int) -> None:
        self.ran += 1


def test_every_call_draws_its_own_input_and_short_ones_are_led_in() -> None:
    contender = _Counter()
    times = time_calls(contender, seconds=1.0, max_calls=5, layers=1)
    assert len(times) == 5
    assert contender.drawn == contender.ran == 7


@pytest.mark.usefixtures("_importable")
def test_a_call_that_takes_too_long_is_made_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    specs = [fake("slow", "Sleeper", log, seconds=1.5), fake("quick", "Sleeper", log, seconds=0.001)]
    slow, quick = measure(specs, [{"batch": 1}], Plan(threads=1, seconds=0.001, longest_call=0.75, patience=120))
    assert slow["skipped"] == "one call took 1.5 s, more than 0.75 s"
    assert slow["verified"]
    assert "us_median" not in slow
    assert (quick["us_median"] or 0) > 0
    assert sum(line.startswith("slow") for line in log.read_text().splitlines()) <= 2
