"""Write files so that a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def cache_folder() -> Path:
    """Return the folder for files that can be made again: $NOGEMM_CACHE, else nogemm's in the user's cache.

    It need not exist.
    """
    if chosen := os.environ.get("NOGEMM_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nogemm"


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """Yield a temporary sibling of `path`, open for writing; it is renamed over `path` when the block ends well.

    Folders on the way are made. On any error, a full disk included, the sibling is removed and `path` keeps what
    it had. Two writers at once do not meet: each has a sibling of its own, and the last to end wins.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.new")
    try:
        with sibling.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
    finally:
        sibling.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary sibling of `path`, then rename it over `path`; see `replacing`."""
    with replacing(path) as file:
        file.write(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
