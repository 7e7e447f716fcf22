"""Write files so that a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, data: bytes) -> None:
    """Write `data` to a temporary sibling of `path`, then rename it over `path`.

    Folders on the way are made. On any error, a full disk included, the sibling is removed and `path` keeps what
    it had.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with sibling.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        sibling.replace(path)
    finally:
        sibling.unlink(missing_ok=True)


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
