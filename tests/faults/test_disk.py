"""A disk that fills up or takes no writes, while something is trained, saved or measured: an error, nothing lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from disks import disk, fill, read_only
from jobs import readable
from safetensors.torch import load_file
from tiny_export import build
from tiny_training import WordTokenizer, make_pair, make_texts

import nogemm
from nogemm.files import disk_is_full
from nogemm.running.partial import Record
from nogemm.train import checkpoint as ckpt
from nogemm.train.distil import Run as DistilRun

SPACE = 4000  # kilobytes: a few checkpoints of the tiny models


def distil(folder: Path, **changes: Any) -> Any:
    pair = make_pair()
    options = {"tokens": 3_000, "batch_tokens": 256, "max_length": 16, "checkpoint_seconds": 0.0, **changes}
    where = {"tokenizer": WordTokenizer(), "bar": False, "output_dir": folder, "resume": True}
    return nogemm.distil(pair.model, pair.teacher, make_texts(), **where, options=nogemm.DistilOptions(**options))


def test_distil_says_where_a_disk_is_full_and_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = distil(tmp_path / "whole").stages[-1].last["loss"]
    with disk(tmp_path / "disk", SPACE) as folder:
        save, saves = DistilRun.save, 0

        def saved(run: DistilRun, *given: Any, **more: Any) -> None:
            nonlocal saves
            saves += 1
            if saves == 4:
                fill(folder, leave=8)
            save(run, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(DistilRun, "save", saved)
            with pytest.raises(nogemm.TrainingError, match=r"No space left.*The last good checkpoint is .*resume=True"):
                distil(folder / "run")
        assert saves == 4
        readable(folder / "run")
        assert ckpt.latest(folder / "run") is not None
        (folder / "filler").unlink()
        assert distil(folder / "run").stages[-1].last["loss"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("leave", [0, 4, 12])
def test_a_disk_that_is_full_from_the_start_is_named(tmp_path: Path, leave: int) -> None:
    with disk(tmp_path / "disk", SPACE) as folder:
        fill(folder, leave)
        for start in (lambda: distil(folder / "run"), lambda: tiny_runs.train(folder / "run")):
            with pytest.raises(nogemm.TrainingError, match="No space left") as caught:
                start()
            assert disk_is_full(caught.value)
            assert str(folder) in str(caught.value)


def test_a_write_that_is_refused_in_a_run_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writes = ckpt.write_folder, 0

    def written(final: Path, checkpoint: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == 3:
            raise OSError(30, "Read-only file system", str(final))
        write(final, checkpoint)

    monkeypatch.setattr(ckpt, "write_folder", written)
    with pytest.raises(nogemm.TrainingError, match=r"Read-only file system.*The last good checkpoint is"):
        distil(tmp_path / "run")
    readable(tmp_path / "run")


@pytest.mark.parametrize("leave", [8, 60])
def test_a_save_that_does_not_fit_leaves_what_was_there(tmp_path: Path, leave: int) -> None:
    with disk(tmp_path / "disk", SPACE) as folder:
        nogemm.save(build(), folder / "model")
        before = load_file(folder / "model" / "model.safetensors")
        fill(folder, leave)
        with pytest.raises(nogemm.CheckpointError, match="untouched") as caught:
            nogemm.save(build(), folder / "model")
        assert disk_is_full(caught.value)
        after = load_file(folder / "model" / "model.safetensors")
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [path.name for path in folder.iterdir() if "saving" in path.name] == []


def test_a_read_only_disk_is_named_by_save(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", SPACE) as folder:
        read_only(folder)
        with pytest.raises(nogemm.CheckpointError, match=r"Read-only file system.*Give a directory"):
            nogemm.save(build(), folder / "model")
        with pytest.raises(nogemm.TrainingError, match=r"Read-only file system.*choose another directory"):
            distil(folder / "run")


def test_a_result_that_cannot_be_written_keeps_the_one_before(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", SPACE) as folder:
        record = Record(folder / "result.json", seconds=0.0)
        record.keep({"rows": [1]})
        before = (folder / "result.json").read_bytes()
        fill(folder, 0)
        with pytest.raises(OSError, match="No space left"):
            record.keep({"rows": list(range(50_000))})
        assert (folder / "result.json").read_bytes() == before
