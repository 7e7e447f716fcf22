"""Write files so that a reader sees the old content or the new, never a part of it."""

from __future__ import annotations

import errno
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


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def disk_is_full(error: BaseException | None) -> bool:
    """Say whether an error is that a disk is full, or follows from one; libraries say so in words of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # as safetensors has it
            return True
        error = error.__cause__ or error.__context__
    return False
