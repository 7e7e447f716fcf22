"""Training checkpoints: whole or not there, whatever happens while they are written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nogemm.errors import CheckpointError
from nogemm.train import checkpoint as ckpt
from nogemm.train.errors import TrainingError


def example(value: float) -> ckpt.Checkpoint:
    parts: dict[str, dict[str, Tensor]] = {
        "model": {"w": torch.full((64, 64), value)},
        "optimiser": {"0.step": torch.tensor(value)},
        "spread": {},
    }
    return ckpt.Checkpoint(parts, {"value": value})


def read_value(directory: Path) -> float:
    path = ckpt.latest(directory)
    assert path is not None
    checkpoint = ckpt.read_checkpoint(path)
    value = float(checkpoint.parts["model"]["w"].unique().item())
    assert checkpoint.state["value"] == value
    assert checkpoint.parts["optimiser"]["0.step"].item() == value
    return value


def test_the_latest_is_read_and_older_ones_go(tmp_path: Path) -> None:
    assert ckpt.latest(tmp_path) is None
    for step in (1, 2, 3):
        ckpt.write_checkpoint(tmp_path, step, example(step))
    assert read_value(tmp_path) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step-00000003"]


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    ckpt.write_checkpoint(tmp_path, 1, example(1))
    ckpt.write_checkpoint(tmp_path, 1, example(2))
    assert read_value(tmp_path) == 2


def test_until_the_pointer_moves_the_old_checkpoint_of_the_same_step_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ckpt.write_checkpoint(tmp_path, 1, example(1))
    plain = os.replace

    def replace(source: Path, target: Path) -> None:
        if target.name == "latest.json":
            raise OSError("power cut")
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(TrainingError, match=r"no checkpoint of step 1 could be written .*power cut.*step-00000001"):
        ckpt.write_checkpoint(tmp_path, 1, example(2))
    monkeypatch.undo()
    assert read_value(tmp_path) == 1
    ckpt.write_checkpoint(tmp_path, 1, example(3))
    assert read_value(tmp_path) == 3
    assert len(list(tmp_path.iterdir())) == 2  # the pointer and what it names


@pytest.mark.parametrize("name", ["model.safetensors", "optimiser.safetensors", "state.json"])
def test_damage_is_found(tmp_path: Path, name: str) -> None:
    path = ckpt.write_checkpoint(tmp_path, 1, example(1))
    (path / name).write_bytes((path / name).read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="damaged"):
        ckpt.read_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        ckpt.read_checkpoint(path)


def test_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ckpt, "VERSION", 99)
    path = ckpt.write_checkpoint(tmp_path, 1, example(1))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 99, this nogemm reads up to 1: upgrade nogemm"):
        ckpt.read_checkpoint(path)


def test_a_damaged_pointer_is_named(tmp_path: Path) -> None:
    (tmp_path / "latest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"latest\.json is damaged"):
        ckpt.latest(tmp_path)


def test_names_survive_flattening() -> None:
    groups = {"a|b": {"x": torch.ones(1)}, "c": {"y": torch.zeros(1)}}
    assert ckpt.unflatten(ckpt.flatten(groups)).keys() == groups.keys()


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_run_checkpoint import example
from nogemm.train import checkpoint as ckpt
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    ckpt.write_checkpoint(Path(sys.argv[2]), 2, example(2))
except Exception as error:
    print("FAILED", type(error).__name__)
"""


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    ckpt.write_checkpoint(tmp_path, 1, example(1))
    command = [sys.executable, "-c", FULL_DISK, str(Path(__file__).parent), str(tmp_path)]
    assert "FAILED" in subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert read_value(tmp_path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest.json", "step-00000001"]


WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_run_checkpoint import example
from nogemm.train import checkpoint as ckpt
for step in range(1, 100000):
    ckpt.write_checkpoint(Path(sys.argv[2]), 7 if sys.argv[3] == "same" else step, example(step))
    print(step, flush=True)
"""


@pytest.mark.parametrize("steps", ["same", "rising"])
def test_killed_at_any_moment_a_whole_checkpoint_remains(tmp_path: Path, steps: str) -> None:
    for round_number in range(3):
        command = [sys.executable, "-c", WRITER, str(Path(__file__).parent), str(tmp_path), steps]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.013 * (round_number + 1))
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        assert read_value(tmp_path) >= 1
