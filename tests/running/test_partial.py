"""Results that are kept while they grow: what a stopped, a killed and an overdue run leave behind."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

import fake_contenders
from benchmark_scripts import load
from nogemm.bench.engine.measure import NOT_REACHED, OUT_OF_TIME, Plan, Spec, measure
from nogemm.bench.engine.row import Row
from nogemm.bench.report.write import write_report
from nogemm.running.measured import Keep, Note, measured
from nogemm.running.partial import RUNNING, Record, Terminated, sigterm_interrupts

HERE = Path(fake_contenders.__file__).parent
CASES = [{"batch": 1}, {"batch": 8}]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def sleepers(tmp_path: Path, *names: str) -> list[Spec]:
    settings = {"seconds": 0.001, "log": str(tmp_path / "log")}
    return [Spec(name=n, factory="fake_contenders:Sleeper", settings=settings | {"name": n}) for n in names]


def test_rows_are_handed_out_as_they_come(tmp_path: Path) -> None:
    seen: list[list[Row]] = []
    plan = Plan(threads=1, seconds=0.001, max_calls=1)
    specs = [*sleepers(tmp_path, "ours", "peer"), Spec(name="absent", factory="no:No", missing="pip install absent")]
    rows = measure(specs, CASES, plan, keep=seen.append)
    assert all(len(part) == len(rows) == 6 for part in seen)
    assert [row.get("skipped") for row in seen[0]] == [NOT_REACHED, NOT_REACHED, None] * 2
    assert seen[1][0]["skipped"] == "verified, not timed"
    (first,) = (part for part in seen if part[0].get("rounds") == 3)
    assert (first[0]["us_median"] or 0) > 0
    assert first[3]["skipped"] == NOT_REACHED
    assert not any("skipped" in row or "rounds" in row for row in rows)


def test_a_run_that_is_out_of_time_says_so_and_ends(tmp_path: Path) -> None:
    plan = Plan(threads=1, seconds=0.001, max_calls=1, seconds_in_all=1e-9)
    rows = measure(sleepers(tmp_path, "ours", "peer"), CASES, plan)
    assert {row["skipped"] for row in rows} == {OUT_OF_TIME}
    assert not any("us_median" in row for row in rows)


def test_a_file_is_partial_until_its_command_has_ended(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    record = Record(file, "model")
    record.keep({"rows": [1]})
    assert json.loads(file.read_text()) == {"kind": "model", "rows": [1], "partial": True, "reason": RUNNING}
    record.keep({"rows": [1, 2]})  # too soon after the first to be written by itself
    assert json.loads(file.read_text())["rows"] == [1]
    found = record.stopped(Terminated())
    assert found is not None
    assert found == json.loads(file.read_text())
    assert found["rows"] == [1, 2]
    assert found["reason"].startswith("stopped by SIGTERM")
    record.done({"rows": [1, 2, 3]})
    assert json.loads(file.read_text()) == {"kind": "model", "rows": [1, 2, 3]}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_measurement_with_what_it_has(tmp_path: Path, number: signal.Signals, code: int) -> None:
    before = signal.getsignal(signal.SIGTERM)
    shown = []

    def work(note: Note, keep: Keep) -> dict[str, Any]:
        keep({"rows": [1]})
        os.kill(os.getpid(), number)
        return {"rows": [1, 2]}

    with pytest.raises(SystemExit) as ended:
        measured("flips", tmp_path / "r.json", work, shown.append)
    assert ended.value.code == code
    assert [result["rows"] for result in shown] == [[1]]
    assert json.loads((tmp_path / "r.json").read_text())["partial"] is True
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failure_keeps_what_was_measured_and_is_raised(tmp_path: Path) -> None:
    def work(note: Note, keep: Keep) -> dict[str, Any]:
        keep({"rows": [1]})
        raise OSError("no disk")

    with pytest.raises(OSError, match="disk"):
        measured("flips", tmp_path / "r.json", work, lambda result: pytest.fail("a failure is not a result"))
    assert "failed (OSError: no disk)" in json.loads((tmp_path / "r.json").read_text())["reason"]


def test_sigterm_ends_the_workers_too(tmp_path: Path) -> None:
    def stop(rows: list[Row]) -> None:
        if "us_median" in rows[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated), sigterm_interrupts():
        measure(sleepers(tmp_path, "ours"), CASES, Plan(threads=1, seconds=0.001), keep=stop)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    names = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children.read_text().split()]
    assert not any(b"nogemm.bench.engine.worker" in name for name in names)


def test_a_report_names_a_partial_result(tmp_path: Path) -> None:
    row = {"contender": "nogemm-int8", "batch": 1, "cache": "fresh", "codes": "uniform", "skipped": NOT_REACHED}
    result = {"kind": "layer", "machine_line": "m", "settings": {"d": 8, "hidden": 32}, "rows": [row]}
    (tmp_path / "slow.json").write_text(
        json.dumps(result | {"partial": True, "reason": "stopped by SIGTERM (after 9 s)"})
    )
    page = write_report([tmp_path / "slow.json"], tmp_path / "r.html").read_text()
    assert "slow.json is partial: stopped by SIGTERM (after 9 s)" in page
    assert NOT_REACHED in page


def test_a_partial_file_is_recorded_anew(tmp_path: Path) -> None:
    record = load("record")
    file = tmp_path / "a.json"
    for text, day in (('{"date": "2026-01-01"}', "2026-01-01"), ('{"date": "2026-01-01", "partial": true}', None)):
        file.write_text(text)
        assert record.recorded(file) == day
