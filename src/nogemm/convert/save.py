"""Save a model so that the path holds the old checkpoint or the new one, complete, at every instant."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from nogemm.convert.exchange import (
    CLOSED,
    FIXED,
    LOCK,
    HalfWayError,
    change_inside,
    discard,
    exchange,
    finish_inside,
    flush,
    former_of,
    stage_inside,
)
from nogemm.convert.sites import installed
from nogemm.errors import CheckpointError, NogemmError, PackedError
from nogemm.layers import PackedFFN
from nogemm.layers._base import is_quantised
from nogemm.models.directory import copy_modules, model_directory, sentence_modules
from nogemm.models.inner import inner_model
from nogemm.models.loading import is_gguf

_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)


def save(model: nn.Module, path: str | Path, *, tokenizer: Any = None) -> None:
    """Save a model, with its tokenizer if given, as a directory that `from_pretrained` loads.

    `save_pretrained` writes into a temporary sibling, which is flushed to disk and then exchanged with `path` in one
    step of the file system. A full disk, an error or a kill leaves the old checkpoint. Files of the old directory that
    the save does not write, a tokenizer for example, are carried over; old weight files are not.

    Args:
        model: a transformers model or a SentenceTransformer, converted or not.
        tokenizer: saved into the same directory.
    Raises:
        CheckpointError: another process saves to `path` now, or writing failed; the old checkpoint is untouched.
        PackedError: the model is packed.
    """
    save_with(model, path, tokenizer, lambda folder: None)


def save_with(model: nn.Module, path: str | Path, tokenizer: Any, extra: Callable[[Path], None]) -> None:
    """Save as `save` does; `extra` adds files to the new directory before it takes the place of the old one."""
    if any(isinstance(layer, PackedFFN) for layer in installed(model).values()):
        raise PackedError("save: the model is packed, for evaluation only; save before packing, or unpack it first")
    refuse_quantised(model, "save")
    needed = sum(value.numel() * value.element_size() for value in inner_model(model).state_dict().values())

    def write(folder: Path) -> None:
        _write(model, tokenizer, folder)
        extra(folder)

    replace_directory(path, write, caller="save", needed=needed)


def save_like(model: Any, source: str | Path, target: str | Path, tokenizer: Any) -> None:
    """Save a model with sentence-transformers' own files of `source`, so that it loads `target` as it loaded that."""
    if is_gguf(source):  # it holds a model and a tokenizer, and nothing of sentence-transformers
        save_with(model, target, tokenizer, lambda folder: None)
        return
    root = model_directory(source)
    sentence_modules(root)  # refuses before anything is written
    save_with(model, target, tokenizer, lambda folder: copy_modules(root, folder))


def refuse_quantised(model: nn.Module, caller: str) -> None:
    """Raise CheckpointError if torch's dynamic quantisation has been at the model."""
    if is_quantised(model):
        raise CheckpointError(
            f"{caller}: torch's dynamic quantisation has rounded matrices of the {type(model).__name__}, into a form "
            "that no checkpoint holds; save the model before it is quantised, and quantise it after loading"
        )


def replace_directory(
    path: str | Path, write: Callable[[Path], None], *, caller: str, needed: int, carry_over: bool = True
) -> None:
    """Let `write` fill a temporary sibling of `path`, flush it, and exchange the two in one step of the file system.

    Where `path` is a mount point, or its parent folder takes no new file, that happens inside `path`, file by file (see
    `exchange.py`).

    Args:
        caller: starts every message.
        needed: bytes that will be written, at least.
        carry_over: keep files of the old directory that `write` does not write, weights apart.
    Raises:
        CheckpointError: `path` is a file, another process writes it now, or writing failed; the old directory is
            untouched.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{caller}: {path} is a file; give a directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not (os.path.ismount(target) or _closed(target)):
            try:
                _replace_beside(target, write, caller, needed, carry_over)
                return
            except OSError as error:
                if error.errno not in FIXED:  # a mount point that does not look like one
                    raise
        _replace_inside(target, write, caller, needed, carry_over)
    except NogemmError:
        raise
    except HalfWayError as error:
        raise CheckpointError(f"{caller}: stopped half-way through {path}: {error}") from error
    except Exception as error:  # safetensors reports a full disk as an error of its own, not as OSError
        closed = isinstance(error, OSError) and error.errno in CLOSED
        advice = ". Give a directory that can be written, or one in a folder that can" if closed else ""
        raise CheckpointError(
            f"{caller}: could not write {path}: {error}{advice}. What was there before is untouched"
        ) from error


def _closed(target: Path) -> bool:
    """Tell whether `target` is there, and the folder that holds it takes no new file."""
    if not target.exists():
        return False
    try:
        os.close(_open_lock(target.with_name(f".{target.name}.lock")))
    except OSError as error:
        if error.errno in CLOSED:
            return True
        raise
    return False


def _replace_beside(target: Path, write: Callable[[Path], None], caller: str, needed: int, carry_over: bool) -> None:
    with _locked(target.with_name(f".{target.name}.lock"), target, caller):
        _remove_leftovers(target)
        fresh = target.with_name(f".{target.name}.saving-{os.getpid()}")
        try:
            fresh.mkdir()
            _check_space(needed, target.parent, caller)
            write(fresh)
            if carry_over and target.exists():
                _carry_over(target, fresh)
            flush(fresh)
            exchange(fresh, target)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # the new one after an error, the old one after an exchange


def _replace_inside(target: Path, write: Callable[[Path], None], caller: str, needed: int, carry_over: bool) -> None:
    with _locked(target / LOCK, target, caller):
        finish_inside(target)
        _check_space(needed, target, caller)
        fresh = stage_inside(target)
        try:
            write(fresh)
            flush(fresh)
            change_inside(fresh, target, lambda entry: not carry_over or _is_weights(entry))
        except HalfWayError:
            raise
        except BaseException:
            discard(fresh.parent)
            raise
        discard(fresh.parent)


def _check_space(needed: int, folder: Path, caller: str) -> None:
    """Refuse early: safetensors fills a memory map, and a disk that fills up under one kills the process."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"{caller}: the model needs {needed / 1e6:.1f} MB, {folder} has {free / 1e6:.1f} MB free. "
            "What was there before is untouched"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _write(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    writer = getattr(model, "save_pretrained", None) or getattr(inner_model(model), "save_pretrained", None)
    if writer is None:
        raise CheckpointError(f"save: {type(model).__name__} has no save_pretrained; it is no transformers model")
    writer(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if not any(folder.rglob("*.safetensors")):
        raise CheckpointError("save: save_pretrained wrote no safetensors file")


def _open_lock(lock: Path) -> int:
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


@contextmanager
def _locked(lock: Path, target: Path, caller: str) -> Iterator[None]:
    """Hold the lock of a path; the system releases it when the process dies."""
    while True:
        handle = _open_lock(lock)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            raise CheckpointError(f"{caller}: another process is saving to {target} now") from error
        try:
            current = os.stat(lock).st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        os.close(handle)  # the former holder removed this file between open and flock
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(handle)


def _remove_leftovers(target: Path) -> None:
    """Remove what killed saves left behind; under the lock nobody else is writing."""
    for old in target.parent.glob(f".{_escape(target.name)}.saving-*"):
        shutil.rmtree(old, ignore_errors=True)
    former = former_of(target)
    if former.exists():
        if target.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:  # killed between the two renames of a file system without exchange
            former.rename(target)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _carry_over(old: Path, new: Path) -> None:
    for entry in old.iterdir():
        destination = new / entry.name
        if destination.exists() or _is_weights(entry):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, destination, symlinks=True)
        else:
            shutil.copy2(entry, destination, follow_symlinks=False)


def _is_weights(entry: Path) -> bool:
    return any(entry.match(pattern) for pattern in _WEIGHTS)
