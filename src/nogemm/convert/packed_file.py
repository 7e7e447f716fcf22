"""A file of tensors that processes map instead of reading: one copy in memory for all of them.

It is a safetensors file with one tensor of bytes, `packed`; what lies where in it stands in the metadata. safetensors
itself keeps no alignment, and kernels need multiples of 64 bytes. Nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import CheckpointError
from nogemm.files import parse_json, remove_abandoned, replacing

FORMAT = 1  # raised, too, when Python code lays packed tensors out in another way
PAGE = 4096  # the bytes begin on a page, and so does every tensor of at least one
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
_CHUNK = 1 << 24  # bytes of one write
ABANDONED = ".packed-*.new"  # what killed writers leave, of models that may never be packed again


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: bytes from the start of the data."""

    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class PackedFile:
    """The tensors of one file, mapped copy-on-write.

    Pages are shared with every process that maps the file, until one of them writes: that write stays in a page of its
    own and never reaches the file. The file may be replaced or deleted meanwhile.

    Args:
        path: as `write_packed` wrote it.
    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, of another format, or somebody else may write to it; the message says which.
    Cost: one pass over the bytes, to compare their checksum.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            _check_owner(os.fstat(file.fileno()))
            start, metadata = _header(file, os.fstat(file.fileno()).st_size)
            self._places = _places(metadata)
            self._start = start
            access = {"flags": mmap.MAP_PRIVATE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
            self._memory = mmap.mmap(file.fileno(), 0, **access)
        size = len(self._memory) - start
        if any(place.at < 0 or place.at % 64 or place.at + place.bytes > size for place in self._places.values()):
            raise CheckpointError("it names tensors that lie outside of it")
        with memoryview(self._memory) as whole, whole[start:] as data:
            if f"{zlib.crc32(data):08x}" != metadata.get("crc32"):
                raise CheckpointError("its bytes differ from what was written")

    @property
    def names(self) -> list[str]:
        """What the tensors are called."""
        return list(self._places)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the mapping, which lives as long as any of them.

        Raises:
            KeyError: there is none of this name.
        """
        place = self._places[name]
        if not place.bytes:
            return torch.empty(place.shape, dtype=place.dtype)
        # A storage of its own for each: whoever copies or pickles one must not take the whole file along.
        count, offset = torch.Size(place.shape).numel(), self._start + place.at
        return torch.frombuffer(self._memory, dtype=place.dtype, count=count, offset=offset).view(place.shape)


def write_packed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors on the CPU, so that `path` holds the old file or the whole new one.

    Raises:
        OSError: a full disk, a folder that cannot be written.
    """
    index, end = {}, 0
    for name, tensor in tensors.items():
        end = _up(end, PAGE if tensor.nbytes >= PAGE else 64)
        index[name] = {"at": end, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
        end += tensor.nbytes
    crc = 0
    for part in _parts(tensors):
        crc = zlib.crc32(part, crc)
    metadata = {"format": str(FORMAT), "index": json.dumps(index), "crc32": f"{crc:08x}"}
    header = json.dumps(
        {"__metadata__": metadata, "packed": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}}
    ).encode()
    header += b" " * (_up(8 + len(header), PAGE) - 8 - len(header))
    remove_abandoned(path.parent, ABANDONED)
    with replacing(path) as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(len(header).to_bytes(8, "little") + header)
        for part in _parts(tensors):
            file.write(part)


def _check_owner(found: os.stat_result) -> None:
    """Refuse a file that others may have made: kernels trust what lies in a packed buffer."""
    if found.st_uid not in (os.geteuid(), 0):
        raise CheckpointError(f"it belongs to another user (uid {found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CheckpointError("other users may write to it")


def _header(file: Any, size: int) -> tuple[int, dict[str, Any]]:
    """Return where the data starts, and the metadata."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(_LONGEST_HEADER, size - 8):
        raise CheckpointError("it is truncated")
    try:
        header = parse_json(file.read(length))
        metadata, begin, end = header["__metadata__"], *header["packed"]["data_offsets"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"its header cannot be read: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != str(FORMAT):
        raise CheckpointError(f"it is not of format {FORMAT}")
    if begin != 0 or end != size - 8 - length:
        raise CheckpointError("it is truncated")
    return 8 + length, metadata


def _places(metadata: Mapping[str, Any]) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    try:
        for name, entry in parse_json(metadata["index"]).items():
            dtype = getattr(torch, entry["dtype"]) if re.fullmatch(r"[a-z0-9_]+", entry["dtype"]) else None
            shape = tuple(entry["shape"])
            numbers = (entry["at"], *shape)
            if not isinstance(dtype, torch.dtype) or any(type(n) is not int or n < 0 for n in numbers):
                raise ValueError(f"{name!r} is no tensor")
            found[name] = _Place(entry["at"], dtype, shape)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its index cannot be read: {error}") from error
    return found


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """Go through the data as it lies in the file, padding included."""
    end = 0
    for tensor in tensors.values():
        start = _up(end, PAGE if tensor.nbytes >= PAGE else 64)
        yield memoryview(bytes(start - end))
        data = as_bytes(tensor)
        yield from (data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK))
        end = start + tensor.nbytes


def as_bytes(tensor: Tensor) -> memoryview:
    """View a tensor's numbers as bytes; a copy where it is not contiguous or not on the CPU."""
    return memoryview(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _up(value: int, to: int) -> int:
    return -(-value // to) * to
