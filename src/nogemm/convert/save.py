"""Save a model so that the path holds the old checkpoint or the new one, complete, at every instant."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from nogemm.convert.sites import inner_model, installed
from nogemm.errors import CheckpointError, NogemmError, PackedError
from nogemm.layers import PackedFFN
from nogemm.layers._base import is_quantised

try:
    import fcntl
except ImportError:  # not on Windows: saving works there, without a lock against a second writer
    fcntl = None

_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target, caller):
        _remove_leftovers(target)
        fresh = target.with_name(f".{target.name}.saving-{os.getpid()}")
        try:
            fresh.mkdir()
            _check_space(needed, target, caller)
            write(fresh)
            if carry_over and target.exists():
                _carry_over(target, fresh)
            _flush(fresh)
            _exchange(fresh, target)
        except NogemmError:
            raise
        except Exception as error:  # safetensors reports a full disk as an error of its own, not as OSError
            raise CheckpointError(
                f"{caller}: could not write {path}: {error}. What was there before is untouched"
            ) from error
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # the new one after an error, the old one after an exchange


def _check_space(needed: int, target: Path, caller: str) -> None:
    """Refuse early: safetensors fills a memory map, and a disk that fills up under one kills the process."""
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise CheckpointError(
            f"{caller}: the model needs {needed / 1e6:.1f} MB, {target.parent} has {free / 1e6:.1f} MB free. "
            "What was there before is untouched"
        )


def _write(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    writer = getattr(model, "save_pretrained", None) or getattr(inner_model(model), "save_pretrained", None)
    if writer is None:
        raise CheckpointError(f"save: {type(model).__name__} has no save_pretrained; it is no transformers model")
    writer(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    if not any(folder.rglob("*.safetensors")):
        raise CheckpointError("save: save_pretrained wrote no safetensors file")


@contextmanager
def _locked(target: Path, caller: str) -> Iterator[None]:
    """Hold the lock of a path; the system releases it when the process dies."""
    if fcntl is None:
        yield
        return
    lock = target.with_name(f".{target.name}.lock")
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
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
    former = _former(target)
    if former.exists():
        if target.exists():
            shutil.rmtree(former, ignore_errors=True)
        else:  # killed between the two renames of a file system without exchange
            former.rename(target)


def _escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _former(target: Path) -> Path:
    return target.with_name(f".{target.name}.former")


def _carry_over(old: Path, new: Path) -> None:
    for entry in old.iterdir():
        destination = new / entry.name
        if destination.exists() or any(entry.match(pattern) for pattern in _WEIGHTS):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, destination, symlinks=True)
        else:
            shutil.copy2(entry, destination, follow_symlinks=False)


def _flush(folder: Path) -> None:
    """Write files and folder entries to disk: a rename must not reach it before the content does."""
    for root, _, files in os.walk(folder):
        for name in (*files, "."):
            path = os.path.join(root, name)
            if not os.path.islink(path):
                _sync(path)


def _sync(path: str | Path) -> None:
    if os.name != "posix":
        return  # Windows opens no directory, and syncs no file that is open for reading
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(fresh: Path, target: Path) -> None:
    """Make `target` the new directory; what was there, if anything, is at `fresh` afterwards."""
    if not target.exists():
        fresh.rename(target)
    elif not _rename_exchange(fresh, target):
        # No exchange on this file system: for an instant the path is absent, and the next save repairs a kill there.
        former = _former(target)
        target.rename(former)
        fresh.rename(target)
        shutil.rmtree(former, ignore_errors=True)
    _sync(target.parent)


def _rename_exchange(a: Path, b: Path) -> bool:
    """Swap two paths atomically (Linux renameat2); return False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
