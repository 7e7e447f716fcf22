"""A run that goes on elsewhere or finds its files changed: other kernels, other threads, another clock, damage."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_training import WordTokenizer, apart, make_pair, make_texts

import nogemm
from nogemm import ops
from nogemm.train.distil import Run as DistilRun

OPTIONS: dict[str, Any] = {"tokens": 3_000, "batch_tokens": 256, "max_length": 16, "checkpoint_seconds": 0.0}


def distil(folder: Path, pair: Any = None) -> Any:
    pair = pair or make_pair()
    where = {"tokenizer": WordTokenizer(), "bar": False, "output_dir": folder, "resume": True}
    nogemm.distil(pair.model, pair.teacher, make_texts(), **where, options=nogemm.DistilOptions(**OPTIONS))
    return pair.model.state_dict()


def stopped(folder: Path, patch: pytest.MonkeyPatch, after: int = 5) -> None:
    """Distil, and break off after so many checkpoints, as a kill would."""
    save, saves = DistilRun.save, 0

    def saved(run: DistilRun, *given: Any, **more: Any) -> None:
        nonlocal saves
        save(run, *given, **more)
        saves += 1
        if saves == after:
            raise KeyboardInterrupt

    with patch.context() as within:
        within.setattr(DistilRun, "save", saved)
        with pytest.raises(KeyboardInterrupt):
            distil(folder)


def test_a_run_goes_on_with_other_kernels_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = make_pair().model.state_dict()
    whole = distil(tmp_path / "whole")
    stopped(tmp_path / "run", monkeypatch)
    torch.set_num_threads(2)
    levels = ops.supported_isas()
    if levels:
        with ops.use_isa("scalar" if "scalar" in levels else levels[0]):
            found = distil(tmp_path / "run")
    else:
        found = distil(tmp_path / "run")
    assert apart(found, whole, start) < 3e-4  # as tests/train/test_distil.py has it
    assert apart(distil(tmp_path / "other", make_pair()), start, whole) > 0.9  # negative control


def test_a_clock_that_is_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = make_pair().model.state_dict()
    whole = distil(tmp_path / "whole")
    now = time.time()

    def back() -> float:
        nonlocal now
        now -= 3600.0
        return now

    monkeypatch.setattr(time, "time", back)
    stopped(tmp_path / "run", monkeypatch)
    assert apart(distil(tmp_path / "run"), whole, start) < 3e-4


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _empty, Path.unlink])
@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "info.json"])
def test_damaged_tokens_of_a_run_are_named(
    name: str, damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(tmp_path / "run", monkeypatch, after=2)
    damage(tmp_path / "run" / "tokens" / name)
    if name == "info.json" and damage is Path.unlink:
        with pytest.raises((nogemm.DataError, OSError)):
            distil(tmp_path / "run")
        return
    with pytest.raises(nogemm.DataError, match=r"tokens is damaged.*delete it"):
        distil(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "[]", "3", '{"version": 1, "parts": 3}', "\udcff"])
def test_damaged_states_of_a_run_are_named(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tmp_path / "run", monkeypatch, after=2)
    (state,) = (tmp_path / "run").glob("step-*/state.json")
    state.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(nogemm.CheckpointError, match="is damaged"):
        distil(tmp_path / "run")


LIMITED = """
import json, resource, sys
import torch
torch.set_num_threads(1)
sys.path[:0] = json.loads(sys.argv[1])
from test_machines import limited
limited(sys.argv[2])
"""


def limited(folder: str) -> None:
    """Train, let memory run out after some steps, say what happens, and go on without the limit."""
    from nogemm.train.lm.run import Run

    after = Run.after_update
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    large: list[Any] = []

    def step(run: Any, trainer: Any) -> Any:
        row = after(run, trainer)
        if run.step == 2 and not large:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), hard))
            large.append(torch.empty(1 << 28))
        return row

    Run.after_update = step  # type: ignore[method-assign]
    try:
        tiny_runs.train(Path(folder), checkpoint_steps=1)
    except (RuntimeError, MemoryError) as error:
        print("said:", type(error).__name__, error, flush=True)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    Run.after_update = after  # type: ignore[method-assign]
    tiny_runs.train(Path(folder), checkpoint_steps=1, resume=True)


@pytest.mark.slow
def test_a_run_whose_memory_ends_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    tiny_runs.train(tmp_path / "whole")
    paths = json.dumps([path for path in sys.path if path])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, paths, str(tmp_path / "run")],
        capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "memory" in done.stdout.lower()
    whole, found = (tiny_runs.log(tmp_path / name) for name in ("whole", "run"))
    assert [row["step"] for row in found] == [row["step"] for row in whole]
    for one, other in zip(found, whole, strict=True):
        assert (one["loss"] is None) == (other["loss"] is None)
        if one["loss"] is not None:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
