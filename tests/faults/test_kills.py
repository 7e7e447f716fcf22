"""The kill harness: a few rounds of every job, and proof that it sees what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jobs import JOBS, apart, readable
from safetensors import SafetensorError
from safetensors.torch import save_file

KILL = Path(__file__).with_name("kill.py")


def kill(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KILL), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_few_kills_lose_nothing(name: str) -> None:
    done = kill("--only", name, "--rounds", 6, "--together")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 faults" in done.stdout


def test_saves_that_are_killed_leave_the_old_model_or_the_new_one() -> None:
    """The quickest job, in every run of the tests."""
    done = kill("--only", "save", "--rounds", 3)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_look_at_files_can_fail(tmp_path: Path) -> None:
    readable(tmp_path)
    (tmp_path / ".result.json.7.new").write_text('{"half')  # a temporary sibling may be anything
    (tmp_path / "run.tmp-7").mkdir()
    (tmp_path / "run.tmp-7" / "state.json").write_text("{")
    readable(tmp_path)
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    readable(tmp_path)
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-4])
    with pytest.raises(SafetensorError):
        readable(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(whole)
    (tmp_path / "result.json").write_text('{"half')
    with pytest.raises(json.JSONDecodeError):
        readable(tmp_path)


def test_outcomes_that_differ_are_told_apart() -> None:
    one = {"log": [{"loss": 1.0, "step": 3}], "weights": {"a": 2.0}}
    assert apart(one, {"log": [{"loss": 1.00001, "step": 3}], "weights": {"a": 2.0}}, 1e-4) == ""
    assert ".log[0].loss" in apart(one, {"log": [{"loss": 1.01, "step": 3}], "weights": {"a": 2.0}}, 1e-4)
    assert ".log[0].step" in apart(one, {"log": [{"loss": 1.0, "step": 4}], "weights": {"a": 2.0}}, 1e-4)
    assert apart(one, {"log": [], "weights": {"a": 2.0}}, 1e-4)
    assert apart(one, {"log": one["log"]}, 1e-4)
