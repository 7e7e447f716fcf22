"""Real runs: a process each, killed and resumed to the same losses, a NaN loss, memory that runs out, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from small_study import TEXT, write

import nogemm
import people
from nogemm.files import disk_is_full
from nogemm.models.loading import load_model
from nogemm.study.plan import read_study
from nogemm.study.process import Stopped, last_line, run_process
from nogemm.study.store import Store
from nogemm.study.worker import finite

LOOKUP = "{name: lookup, method: lookup, set: {tables: 4, bits: 3, projection.block: 8}}"
ONE = TEXT.replace("[0, 1]", "[0]")


def command(file: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    """Start `nogemm study` in a process of its own."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "nogemm", "study", str(file), "-o", str(out), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | settings,
    )  # fmt: skip


def values(out: Path) -> dict[str, Any]:
    """Return the losses of all finished runs, the measurements on the way included."""
    found = {}
    for path in sorted(out.glob("*/seed-*.json")):
        result = json.loads(path.read_text())
        found[f"{path.parent.name}/{path.stem}"] = (result["value"], result["figures"] and result["figures"]["history"])
    return found


def wait_for(condition: Any, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.01)


def test_runs_that_work_and_runs_that_fail(tmp_path: Path) -> None:
    broken = "{name: nan, method: no, options: {lr: 1e30, clip: 0}}"
    file = write(tmp_path, ONE + f"rows: [{broken}, {LOOKUP}]")
    report = nogemm.study(file, tmp_path / "out")
    nan, lookup = report.table["rows"]
    assert "TrainingError" in nan["errors"][0]["error"]
    assert "not finite" in nan["errors"][0]["error"] or "is nan" in nan["errors"][0]["error"]
    assert lookup["mean"]["value"] > 0
    assert (
        lookup["figures"]["ffn_flops"]
        == nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(block=8)).build(16).cost(1).flops
    )
    result = json.loads((tmp_path / "out" / "lookup" / "seed-0.json").read_text())
    assert result["report"]["options"]["seed"] == 0
    assert result["machine"]["versions"]["nogemm"]
    assert str(tmp_path) not in json.dumps(result)
    work = tmp_path / "out" / "work" / "lookup" / "seed-0"
    assert sorted(path.name for path in work.iterdir()) == ["log.csv", "log.jsonl", "output.txt"]


def test_memory_that_runs_out_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = read_study(write(tmp_path, ONE + f"rows: [{LOOKUP}]"))
    store = Store(plan, tmp_path / "out")
    job = store.job(store.final(plan.rows[0], 0))
    # The system ends a process that asks for too much by SIGKILL; here a shell in Python's place does it itself.
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -KILL $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    outcome = run_process(job, None, lambda line: None, lambda: False)
    assert outcome["status"] == "failed"
    assert "as the system does when memory runs out" in outcome["error"]
    killer.write_text("#!/bin/sh\necho 'no such module'\nexit 3\n")
    assert "ended with code 3; its last line: no such module" in run_process(job, None, print, lambda: False)["error"]
    killer.write_text("#!/bin/sh\nexit 28\n")
    with pytest.raises(nogemm.StudyError, match="no room left on the disk"):
        run_process(job, None, lambda line: None, lambda: False)
    killer.write_text("#!/bin/sh\nsleep 60\n")
    with pytest.raises(Stopped):
        run_process(job, None, lambda line: None, lambda: True)


def test_a_full_disk_is_told_from_other_errors() -> None:
    assert disk_is_full(OSError(28, "No space left on device"))
    assert disk_is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    error = ValueError("no checkpoint")
    assert not disk_is_full(error)
    error.__cause__ = OSError(28, "full")
    assert disk_is_full(error)
    assert not disk_is_full(OSError(2, "No such file"))
    assert finite({"a": [1.0, float("inf")], "b": float("nan")}) == {"a": [1.0, None], "b": None}


def test_the_last_whole_line_is_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"one\ntwo\nthr")
    assert last_line(tmp_path / "log") == "two"
    assert last_line(tmp_path / "gone") == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_study_ends_with_the_same_losses(number: signal.Signals, tmp_path: Path) -> None:
    text = ONE.replace("steps: 4", "steps: 150, checkpoint_steps: 5, validate_steps: 50") + f"rows: [{LOOKUP}]"
    file = write(tmp_path, text)
    assert command(file, tmp_path / "whole").wait(300) == 0
    parts = command(file, tmp_path / "parts")
    work = tmp_path / "parts" / "work" / "lookup" / "seed-0"
    wait_for(lambda: (work / "latest.json").is_file(), parts)
    parts.send_signal(number)
    _, err = parts.communicate(timeout=300)
    codes = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
    assert parts.returncode == codes[number], err
    if number != signal.SIGKILL:
        assert "The same command goes on where it was" in err
    assert values(tmp_path / "parts") == {}
    again = command(file, tmp_path / "parts")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "1 runs done, 0 failed, 0 left" in out
    assert values(tmp_path / "parts") == values(tmp_path / "whole")
    assert "resume" not in err


def test_a_converted_model_is_distilled_and_saved(tmp_path: Path) -> None:
    people.bert(tmp_path / "dense")
    texts = [f"{a} {b} of the {c}" for a in people.WORDS for b in people.WORDS for c in people.WORDS[:3]]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    text = """
kind: distil
model: dense
data: texts.txt
validation: texts.txt
common: {tokens: 600, batch_tokens: 100}
save: true
baseline: narrow
rows:
  - {name: narrow, method: dense, set: {hidden: 8}, fit: 50}
  - {name: one-layer, method: null, keep: [1]}
"""
    report = nogemm.study(write(tmp_path, text), tmp_path / "out")
    assert report.failed == 0, report.table["notes"]
    narrow, one = report.table["rows"]
    assert 0 < narrow["mean"]["value"] <= 1
    assert one["difference"]["value"] == pytest.approx(one["mean"]["value"] - narrow["mean"]["value"])
    assert narrow["figures"]["ffn_flops"] == 2 * 2 * 2 * 16 * 8
    assert one["figures"]["ffn_flops"] == 2 * 2 * 16 * 32  # the FFN that was left as it is
    work = tmp_path / "out" / "work"
    assert nogemm.converted(load_model(work / "narrow" / "seed-0" / "model"))
    assert load_model(work / "one-layer" / "seed-0" / "model").config.num_hidden_layers == 1
    result = json.loads((tmp_path / "out" / "one-layer" / "seed-0.json").read_text())
    assert result["report"]["options"]["hidden_map"] == [2]
    assert result["machine"]["line"]
