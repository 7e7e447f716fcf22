"""Messages between the server and a worker: two lengths, JSON, and the bytes of an array.

Nothing but text and numbers is read: no pickle.
"""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.typing import NDArray

HEAD = struct.Struct(">II")
MOST_BYTES = 1 << 30


def pack_frame(message: dict[str, Any], array: NDArray[np.float32] | None = None) -> bytes:
    """Return a message, and an array behind it, as bytes."""
    if array is not None:
        message = {**message, "shape": list(array.shape)}
    words = orjson.dumps(message)
    data = b"" if array is None else np.ascontiguousarray(array, np.float32).tobytes()
    return HEAD.pack(len(words), len(data)) + words + data


def lengths(head: bytes) -> tuple[int, int]:
    """Return the lengths of JSON and array; EOFError if these bytes are no head of ours."""
    words, data = HEAD.unpack(head)
    if max(words, data) > MOST_BYTES:
        raise EOFError("a message of more than 1 GiB")
    return words, data


def unpack_frame(words: bytes, data: bytes) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """Return the message and its array."""
    message = orjson.loads(words)
    if "shape" not in message:
        return message, None
    return message, np.frombuffer(data, np.float32).reshape(message["shape"])


def read_frame(file: BinaryIO) -> dict[str, Any] | None:
    """Return the next message of the server; None: it has closed."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    words, data = lengths(head)
    found = file.read(words + data)
    return None if len(found) < words + data else unpack_frame(found[:words], found[words:])[0]
