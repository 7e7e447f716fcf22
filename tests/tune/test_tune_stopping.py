"""A search stopped anywhere ends as one that nobody stopped; a folder in use or of another search is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_tune import TEXTS, MadeUp, dense, made_up, tune

import nogemm
from nogemm.train.distil import Run
from nogemm.tune import ledger as ledger_module
from nogemm.tune import timing
from nogemm.tune.ledger import Ledger

__all__ = ["made_up"]  # a fixture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense(tmp_path_factory.mktemp("tune") / "dense")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> nogemm.TuneReport:
    """The report of a search that nobody stopped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "measure", MadeUp())
        return tune(model, tmp_path_factory.mktemp("whole") / "run", latency_ms=0.7).report


def figures(report: nogemm.TuneReport) -> list[tuple[Any, ...]]:
    """What must not depend on where a search was stopped."""
    return [(row["name"], row["us_median"], row["validation"], row["agreement"], row["tokens"]) for row in report.rows]


STAGES = ("dense", "evidence", "latency", "check", "short", "full", "final")


@pytest.mark.parametrize("stage", STAGES)
def test_a_search_stopped_in_any_stage_ends_as_one_that_nobody_stopped(
    stage: str,
    model: Path,
    whole: nogemm.TuneReport,
    tmp_path: Path,
    made_up: MadeUp,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    take = Ledger.take

    def stopped(self: Ledger, name: str, key: str, work: Any) -> Any:
        if name == stage and key not in self.stage(name):
            if stage in ("evidence", "short") and len(self.stage(name)) < 2:
                return take(self, name, key, work)  # in the middle of it
            raise KeyboardInterrupt
        return take(self, name, key, work)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "take", stopped)
        with pytest.raises(nogemm.TrainingInterrupted, match=r"resume=True \(--resume"):
            tune(model, tmp_path / "parts", latency_ms=0.7)
    before = len(made_up.seen)
    again = tune(model, tmp_path / "parts", latency_ms=0.7, resume=True).report
    assert figures(again) == figures(whole)
    assert again.chosen == whole.chosen
    if stage == "final":
        assert len(made_up.seen) - before <= len(again.rows)  # what had been timed was not timed again


def test_a_search_stopped_while_it_trains_goes_on_there(
    model: Path, whole: nogemm.TuneReport, tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = Run._step

    def stopping(self: Run, *args: Any) -> Any:
        steps.append(None)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_step", stopping)
        with pytest.raises(nogemm.TrainingInterrupted, match="tune was interrupted"):
            tune(model, tmp_path / "parts", latency_ms=0.7)
    assert list((tmp_path / "parts" / "runs").glob("*/step-*"))
    assert figures(tune(model, tmp_path / "parts", latency_ms=0.7, resume=True).report) == figures(whole)


def test_a_finished_search_gives_its_report_again_and_another_one_is_refused(
    model: Path, tmp_path: Path, made_up: MadeUp
) -> None:
    folder = tmp_path / "run"
    first = tune(model, folder, latency_ms=0.7).report
    seen = len(made_up.seen)
    assert figures(tune(model, folder, latency_ms=0.7, resume=True).report) == figures(first)
    assert len(made_up.seen) == seen
    with pytest.raises(nogemm.TrainingError, match=r"holds an earlier search.*--resume"):
        tune(model, folder, latency_ms=0.7)
    for changes, said in (
        ({"latency_ms": 0.6}, "another budget: latency_ms 0.7, now latency_ms 0.6"),
        ({"quality": 0.9}, "another budget: latency_ms 0.7, now quality 0.9"),
        ({"latency_ms": 0.7, "data": TEXTS[:60]}, "another data"),
        ({"latency_ms": 0.7, "tokens": 400}, "other options: tokens: 500, now 400"),
        ({"latency_ms": 0.7, "engine": None}, "other options: engine: torch-fp32, now None"),
    ):
        with pytest.raises(nogemm.TrainingError, match=said):
            tune(model, folder, resume=True, **changes)
    with pytest.raises(nogemm.TrainingError, match="another model"):
        tune(dense(tmp_path / "other", layers=2), folder, latency_ms=0.7, resume=True)


def test_two_searches_in_one_folder_are_refused(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(nogemm.TrainingError, match="another run is writing"):
            tune(model, folder, quality=0.9)


@pytest.mark.parametrize("stage", ["dense", "evidence", "short", "final"])
def test_a_full_disk_is_told_and_costs_nothing_that_was_found(
    stage: str, model: Path, tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ledger_module.write_json

    def full(path: Path, value: Any) -> None:
        if Path(path).name == f"{stage}.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "write_json", full)
        with pytest.raises(nogemm.TrainingError, match=r"no room to write: .*No space left.*resume=True"):
            tune(model, tmp_path / "run", latency_ms=0.7)
    assert not list((tmp_path / "run").glob("*.new"))
    report = tune(model, tmp_path / "run", latency_ms=0.7, resume=True).report
    assert report.met
