"""Checkpoints of a run: safetensors and JSON in a directory of their own, made visible by one rename.

    output_dir/step-00000120/{model,optimiser,...}.safetensors, state.json
    output_dir/latest.json                  {"checkpoint": "step-00000120"}: replaced last

A checkpoint is written into a temporary sibling, synced, renamed; then `latest.json` is replaced; then older ones go.
A second checkpoint of the same step gets a name of its own (`step-00000120.2`), so that what `latest.json` names is
never touched. Killed at any moment, a run finds either the old or the new checkpoint whole. `Lock` keeps a second
writer out.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nogemm.errors import CheckpointError, NogemmError
from nogemm.files import disk_is_full, parse_json
from nogemm.train.errors import TrainingError

VERSION = 1
PARTS = ("model", "optimiser", "spread")
"""Of a checkpoint that does not list its own."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on: named tensors in parts, such as "model" and "optimiser", and JSON values."""

    parts: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


class Lock:
    """Hold `output_dir/lock` while a run writes there; a second run is refused at once."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._file = None

    def __enter__(self) -> Lock:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "w", encoding="utf-8")
        except OSError as error:
            raise TrainingError(
                f"no checkpoint can be kept in {self._path.parent}: {error}; choose another directory with output_dir "
                "(--run on the command line)"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise TrainingError(f"another run is writing to {self._path.parent}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def write_checkpoint(directory: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, make it the latest, remove the others; return its directory.

    Raises:
        TrainingError: it cannot be written; the last good checkpoint stays.
    """
    final = _free_name(directory / f"step-{step:08d}")
    try:
        write_folder(final, checkpoint)
        pointer = directory / f"latest.json.tmp-{os.getpid()}"
        _write_json(pointer, {"checkpoint": final.name})
        _sync(pointer)
        os.replace(pointer, directory / "latest.json")
        _sync(directory)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise unwritten(directory, f"no checkpoint of step {step}", error) from error
    for old in directory.glob("step-*"):
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    for leftover in directory.glob("latest.json.tmp-*"):
        leftover.unlink(missing_ok=True)
    return final


def unwritten(directory: Path, what: str, error: Exception) -> TrainingError:
    """Return an error that says what could not be written, what was kept, and how to go on."""
    return TrainingError(
        f"{what} could be written to {directory}: {error}. {kept(directory)} Make room there, and go on with "
        "resume=True (--resume on the command line)"
    )


def kept(directory: Path) -> str:
    """Say in a sentence which checkpoint there is."""
    found = latest(directory)
    return f"The last good checkpoint is {found}." if found else "No checkpoint was kept before."


@contextmanager
def room_is_told(directory: Path, caller: str) -> Iterator[None]:
    """Let an error that follows from a full disk say where that is, what was kept, and how to go on.

    Raises:
        TrainingError: the disk is full.
    """
    try:
        yield
    except NogemmError:
        raise
    except Exception as error:  # tokenizers reports a full disk as a bare Exception, safetensors as an error of its own
        if not disk_is_full(error):
            raise
        raise unwritten(directory, f"{caller}: not all", error) from error


def write_folder(final: Path, checkpoint: Checkpoint) -> None:
    """Write tensors and state into a new directory, made visible by one rename; a half-written one is removed."""
    temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for name, part in checkpoint.parts.items():
            # Equal storage under two names (tied weights) is stored twice: safetensors refuses shared memory.
            tensors = {key: value.detach().clone(memory_format=_contiguous()) for key, value in part.items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        _write_json(temporary / "state.json", {"version": VERSION, "parts": [*checkpoint.parts], **checkpoint.state})
        for file in (*temporary.iterdir(), temporary):
            _sync(file)
        os.replace(temporary, final)
        _sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def latest(directory: Path) -> Path | None:
    """Return the directory of the latest whole checkpoint, or None if there is none."""
    pointer = directory / "latest.json"
    if not pointer.is_file():
        return None
    try:
        path = directory / parse_json(pointer.read_text(encoding="utf-8"))["checkpoint"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{pointer} is damaged: {error}") from error
    return path


def refuse_earlier_run(directory: Path) -> None:
    """Raise TrainingError if the directory holds a checkpoint: a new run would replace it."""
    if latest(directory) is not None:
        raise TrainingError(
            f"{directory} holds an earlier run: continue it with resume=True (--resume on the command line), "
            "or choose another directory (--run)"
        )


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint directory.

    Raises:
        CheckpointError: a file is missing, truncated, or of a newer version.
    """
    try:
        state = parse_json((path / "state.json").read_text(encoding="utf-8"))
        _check_version(path, state)
        parts = {name: load_file(path / f"{name}.safetensors") for name in state.get("parts", PARTS)}
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"the training checkpoint {path} is damaged: {error}") from error
    return Checkpoint(parts, state)


def _check_version(path: Path, state: Any) -> None:
    """Refuse what another release wrote, before its parts are looked for: they may be others."""
    version = state.get("version") if isinstance(state, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"the training checkpoint {path} has format {version}, this nogemm reads up to {VERSION}: upgrade nogemm "
            "to resume it"
        )
    if version != VERSION:
        raise CheckpointError(f"the training checkpoint {path} is damaged: its format is {version!r}, not {VERSION}")


def flatten(groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join two levels of names with "|"."""
    return {f"{outer}|{inner}": value for outer, part in groups.items() for inner, value in part.items()}


def unflatten(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Undo `flatten`."""
    out: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        outer, _, inner = key.rpartition("|")
        out.setdefault(outer, {})[inner] = value
    return out


def _free_name(path: Path) -> Path:
    """Return the path, or the first of path.2, path.3, ... that does not exist."""
    name, number = path, 1
    while name.exists():
        number += 1
        name = path.with_name(f"{path.name}.{number}")
    return name


def _contiguous():
    import torch

    return torch.contiguous_format


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True), encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
