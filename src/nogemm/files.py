"""Write files so that a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def cache_folder() -> Path:
    """Return the folder for files that can be made again: $NOGEMM_CACHE, else nogemm's in the user's cache.

    It need not exist.
    """
    if chosen := os.environ.get("NOGEMM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nogemm"


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a temporary sibling of `path`, open for writing; it is renamed over `path` when the block ends well.

    Folders on the way are made. On any error, a full disk included, the sibling is removed and `path` keeps what
    it had. What writers that were killed left beside `path` is removed, too. Two writers at once do not meet: each has
    a sibling of its own, and the last to end wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.new")
    with _held(sibling) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            sibling.replace(path)
        except BaseException:
            sibling.unlink(missing_ok=True)
            raise
    remove_abandoned(path.parent, f".{glob.escape(path.name)}.*.new")


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary sibling of `path`, then rename it over `path`; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def parse_json(text: str) -> Any:
    """Read a JSON text, as `json.loads` does.

    Raises:
        ValueError: it is no JSON, or nests deeper than Python's stack, where `json.loads` raises a RecursionError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("lists or objects in it are nested too deeply") from None


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def disk_is_full(error: BaseException | None) -> bool:
    """Say whether an error is that a disk is full, or follows from one; also where a library says so in its words."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _held(sibling: Path) -> Iterator[BinaryIO]:
    """Open a sibling, empty, and hold its lock, which the system releases when the process dies."""
    while True:
        handle = os.open(sibling, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with os.fdopen(handle, "r+b") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if not _is(sibling, handle):
                continue  # another writer took it for left behind, between open and lock
            file.truncate()
            yield file
            return


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Remove siblings of `replacing` that match a pattern and whose writers are dead: nobody holds their locks."""
    for name in glob.glob(pattern, root_dir=folder, include_hidden=True):
        with contextlib.suppress(OSError), (folder / name).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(folder / name, file.fileno()):
                (folder / name).unlink(missing_ok=True)


def _is(path: Path, handle: int) -> bool:
    """Say whether a path still names the file that was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
