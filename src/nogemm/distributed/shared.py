"""Memory that the ranks of one machine share, in place of sockets: some microseconds for a small list.

Each rank has a block: a counter, and two places for what it says. In turn t it writes into place t mod 2, and then sets
its counter to t; whoever sees t there reads. A rank that has said t has read everything of turn t - 1, so a place is
written again only when all have read it.

The file's name is gone as soon as every rank has opened it, so that nothing is left behind, whoever dies. Each rank
holds a lock on a byte of the file, which the system lets go of when the process ends, however it ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO

import torch
from torch import Tensor

from nogemm.errors import DistributedError
from nogemm.hardware.cpu import usable_cores
from nogemm.ops import native_available
from nogemm.ops._library import native

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FOLDER = Path("/dev/shm")
PLACE = 1 << 20  # bytes that a rank can say in one turn
_LINE = 128  # bytes apart, so that no two counters share a line of a cache
_BLOCK = 2 * _LINE + 2 * PLACE
_LOOKS = 4000  # at the counters before the core is given away, some 20 microseconds
_PATIENCE = 0.05  # seconds between looks for ranks that have ended


def unusable() -> str | None:
    """Say why this process cannot share memory, or None."""
    if not native_available():
        return "the native extension is not loaded"
    if fcntl is None or not FOLDER.is_dir():
        return f"this system has no {FOLDER}"
    return None


class SharedMemory:
    """The memory that this rank and others have mapped.

    Args:
        file: open for reading and writing, the same on all ranks; kept open, because closing it would give the lock up.
    """

    def __init__(self, file: IO[bytes], rank: int, ranks: int) -> None:
        self.file, self.rank, self.ranks = file, rank, ranks
        self.turn = 0
        _lock(file, rank)
        memory = mmap.mmap(file.fileno(), ranks * _BLOCK)
        self._words = memoryview(memory).cast("Q")
        blocks_PB = torch.frombuffer(memory, dtype=torch.uint8).view(ranks, _BLOCK)
        self._address = blocks_PB.data_ptr()
        self._places = [blocks_PB[:, at : at + PLACE] for at in (2 * _LINE, 2 * _LINE + PLACE)]
        self._looks = _LOOKS if ranks <= usable_cores() else 0  # a rank that spins would hold back one that works
        library = native()
        library.nogemm_shared_publish.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
        library.nogemm_shared_publish.restype = None
        library.nogemm_shared_wait.argtypes = [
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int64, ctypes.c_double
        ]  # fmt: skip
        library.nogemm_shared_wait.restype = ctypes.c_int64
        self._publish: Callable[[int, int], None] = library.nogemm_shared_publish
        self._wait: Callable[[int, int, int, int, int, float], int] = library.nogemm_shared_wait

    def gather(self, bytes_B: Tensor, timeout: float) -> Tensor:
        """Say up to PLACE bytes, uint8 [B], and return what each rank says in this turn, [P, B]: a view until the next.

        Raises:
            DistributedError: a rank has ended, did not come within the timeout, or says another number of bytes.
        """
        self.turn += 1
        place, count, block = self.turn & 1, bytes_B.numel(), self.rank * _BLOCK
        ctypes.memmove(self._address + block + 2 * _LINE + place * PLACE, bytes_B.data_ptr(), count)
        self._words[(block + _LINE) // 8 + place] = count
        self._publish(self._address + block, self.turn)
        self._wait_for_all(timeout)
        for rank in range(self.ranks):
            said = self._words[(rank * _BLOCK + _LINE) // 8 + place]
            if said != count:
                raise DistributedError(
                    f"rank {rank} sent {said} bytes where rank {self.rank} sent {count}: the ranks do not make the "
                    "same calls on tensors of the same shape"
                )
        return self._places[place][:, :count]

    def close(self) -> None:
        """Let go of the lock: others that wait for this rank are told that it has ended."""
        self.file.close()

    def _wait_for_all(self, timeout: float) -> None:
        looks, deadline = self._looks, time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            seconds = max(0.0, min(_PATIENCE, left))
            missing = self._wait(self._address, self.ranks, _BLOCK, self.turn, looks, seconds)
            if missing == self.ranks:
                return
            if _has_ended(self.file, missing) and self._words[missing * _BLOCK // 8] < self.turn:
                raise DistributedError(f"rank {missing} has ended")
            if left <= 0:
                raise DistributedError(f"rank {missing} did not answer within {timeout:g} seconds")
            looks = 0


def create(ranks: int) -> tuple[IO[bytes], int]:
    """Make a file for so many ranks, and return it with the number in its name.

    Raises:
        OSError: the system has no room.
    """
    number = secrets.randbits(62) + 1
    descriptor = os.open(_path(number), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    file = os.fdopen(descriptor, "r+b", buffering=0)
    try:
        os.posix_fallocate(descriptor, 0, ranks * _BLOCK)  # now: memory that is short later would end the process
    except OSError:
        file.close()
        remove(number)
        raise
    return file, number


def attach(number: int) -> IO[bytes]:
    """Open the file that another rank made.

    Raises:
        OSError: it is not there: the ranks are not on one machine, or not in one container.
    """
    return os.fdopen(os.open(_path(number), os.O_RDWR), "r+b", buffering=0)


def remove(number: int) -> None:
    """Take the file's name away; who has it open keeps it."""
    _path(number).unlink(missing_ok=True)


def _path(number: int) -> Path:
    return FOLDER / f"nogemm-{number:016x}"


def _lock(file: IO[bytes], rank: int) -> None:
    assert fcntl is not None
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)


def _has_ended(file: IO[bytes], rank: int) -> bool:
    """Try for another rank's lock, which can be had only when its process is gone."""
    assert fcntl is not None
    try:
        _lock(file, rank)
    except OSError:
        return False
    fcntl.lockf(file, fcntl.LOCK_UN, 1, rank)
    return True
