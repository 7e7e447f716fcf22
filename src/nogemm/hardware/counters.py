"""Count events of the processor with Linux's perf_event_open, where the machine and its kernel allow it.

Virtual machines usually do not pass the counters on, and containers often forbid the call: `open_counters` then says
why, and whoever asked falls back to a simulator or to nothing. Only the calling process is counted, all its threads,
user space alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from nogemm.errors import NativeError

HARDWARE, SOFTWARE, CACHE = 0, 1, 3
_L1D, _LL, _DTLB = 0, 2, 3
_ACCESS, _MISS = 0, 1 << 16
# name: (type, config) of perf_event_attr; a cache event is cache | read << 8 | result << 16, and read is 0.
EVENTS: Final = {
    "cycles": (HARDWARE, 0),
    "instructions": (HARDWARE, 1),
    "l1_loads": (CACHE, _L1D | _ACCESS),
    "l1_misses": (CACHE, _L1D | _MISS),
    "llc_loads": (CACHE, _LL | _ACCESS),
    "llc_misses": (CACHE, _LL | _MISS),
    "tlb_loads": (CACHE, _DTLB | _ACCESS),
    "tlb_misses": (CACHE, _DTLB | _MISS),
    "page_faults": (SOFTWARE, 2),
}
HARDWARE_EVENTS: Final = tuple(name for name, (kind, _) in EVENTS.items() if kind != SOFTWARE)

_SYSCALL = {"x86_64": 298, "aarch64": 241}
_ENABLE, _DISABLE, _RESET = 0x2400, 0x2401, 0x2403
_ATTRIBUTE_BYTES = 112
# bits of perf_event_attr: starts disabled, new threads inherit, kernel and hypervisor are not counted
_FLAGS = 1 | 1 << 1 | 1 << 5 | 1 << 6
_TIMES = 1 | 2  # read_format: time enabled, time running


class Counters:
    """Count some events between `start` and `stop`, in all threads of this process.

    Args:
        names: keys of EVENTS.
    Raises:
        NativeError: the system does not count one of them; the message says which and why.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._files: dict[str, list[int]] = {name: [] for name in names}
        try:
            for name in names:
                for thread in _threads():
                    self._files[name].append(_open(name, thread))
        except NativeError:
            self.close()
            raise

    def start(self) -> None:
        """Count from zero."""
        self._tell(_RESET)
        self._tell(_ENABLE)

    def stop(self) -> dict[str, float]:
        """Stop, and return {name: count}; a count shared with other events is scaled up to the whole time."""
        self._tell(_DISABLE)
        return {name: sum(_scaled(os.read(file, 24)) for file in files) for name, files in self._files.items()}

    def close(self) -> None:
        """Give the counters back."""
        for files in self._files.values():
            for file in files:
                os.close(file)
            files.clear()

    def _tell(self, request: int) -> None:
        for files in self._files.values():
            for file in files:
                fcntl.ioctl(file, request, 0)


def why_no_counters(names: Sequence[str] = HARDWARE_EVENTS) -> str | None:
    """Say why these events cannot be counted here; None if they can."""
    try:
        Counters(names).close()
    except NativeError as error:
        return str(error)
    return None


def attribute(name: str) -> bytes:
    """Return the perf_event_attr that asks for an event: type, size, config, -, -, read format, flags, zeros."""
    kind, config = EVENTS[name]
    head = struct.pack("<IIQQQQQ", kind, _ATTRIBUTE_BYTES, config, 0, 0, _TIMES, _FLAGS)
    return head.ljust(_ATTRIBUTE_BYTES, b"\0")


def _open(name: str, thread: int) -> int:
    number = _SYSCALL.get(platform.machine())
    if sys.platform != "linux" or number is None:
        raise NativeError(f"no perf events on {sys.platform} {platform.machine()}")
    wanted = ctypes.create_string_buffer(attribute(name), _ATTRIBUTE_BYTES)
    call = ctypes.CDLL(None, use_errno=True).syscall
    call.restype = ctypes.c_long
    close_on_exec = 8
    file = call(number, wanted, thread, -1, -1, ctypes.c_ulong(close_on_exec))
    if file >= 0:
        return file
    error = ctypes.get_errno()
    said = {
        errno.ENOENT: "this machine does not count it",
        errno.EOPNOTSUPP: "this machine does not count it",
        errno.EACCES: "not allowed: kernel.perf_event_paranoid",
        errno.EPERM: "not allowed: kernel.perf_event_paranoid, or a container",
        errno.ENOSYS: "the kernel has no perf events",
    }
    raise NativeError(f"perf event {name}: {said.get(error, os.strerror(error))}")


def _threads() -> list[int]:
    return sorted(int(entry.name) for entry in Path("/proc/self/task").glob("*")) or [0]


def _scaled(record: bytes) -> float:
    """Scale a count by the share of the time it was counted in."""
    value, enabled, running = struct.unpack("<QQQ", record)
    return value * enabled / running if running else float(value)
