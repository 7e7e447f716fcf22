"""Measure what the machine reaches: multiply-adds per second, and load bandwidth from each level of the caches.

The loops are native, one call per thread, with Python's lock released; without the extension there is no roofline, and
the figures that need one are None instead of wrong. A measurement is the best of several short runs: the question is
what the machine can do, and whatever disturbs it only takes away.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nogemm.hardware.cpu import caches
from nogemm.ops import native_available, supported_isas, use_isa
from nogemm.ops._library import native

_KINDS = {"fp32": 0, "bf16": 1, "int8": 2}
_RUNS = 15  # five have left the int8 peak at two thirds of what another day gave
_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Hold what `measure_roofline` found for a number of threads.

    Attributes:
        threads: that ran at once.
        gflops: {"fp32", "bf16", "int8", "int16"}: 1e9 operations/s of the instruction set in force, a multiply-add as
            2; a precision without an instruction of its own is missing; int16, half as many lanes, is half of int8.
        gb_per_s: {"L1", "L2", "L3", "memory"}: 1e9 bytes/s of loads from a buffer of that level.
    """

    threads: int
    gflops: dict[str, float]
    gb_per_s: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-able values."""
        return asdict(self)

    def bound(self, flops: dict[str, float], bytes_from: dict[str, float]) -> tuple[float, str]:
        """Return the least time in us that the work can take, and what bounds it.

        time = max( flops[p] / gflops[p], bytes_from[l] / gb_per_s[l] ), a precision that was not measured as fp32
        """
        times = {
            f"{name} compute": count / self.gflops.get(name, self.gflops["fp32"]) * 1e-3
            for name, count in flops.items()
        }
        times |= {level: count / self.gb_per_s[level] * 1e-3 for level, count in bytes_from.items()}
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


def measure_roofline(threads: int) -> Roofline | None:
    """Measure compute peaks and load bandwidths with `threads` threads; None without the native extension.

    Cost: a second or two.
    """
    if not native_available():
        return None
    library = native()
    library.nogemm_roofline_compute.restype = ctypes.c_double
    library.nogemm_roofline_compute.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.nogemm_roofline_load.restype = ctypes.c_double
    library.nogemm_roofline_load.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    with ThreadPoolExecutor(threads) as pool:
        rates = {
            name: _rate(
                pool, threads, lambda loops, _, kind=kind: library.nogemm_roofline_compute(kind, loops), 1 << 16
            )
            for name, kind in _KINDS.items()
        }
        loads = {}
        for level, size in level_sizes(threads).items():
            buffers = [np.ones(size // 4, dtype=np.float32) for _ in range(threads)]
            count = size // 4

            def load(repeats: int, thread: int, buffers: list[Any] = buffers, count: int = count) -> float:
                return library.nogemm_roofline_load(buffers[thread].ctypes.data, count, repeats)

            loads[level] = _rate(pool, threads, load, max(1, (1 << 20) // size))
    rates["int16"] = rates["int8"] / 2
    return Roofline(
        threads=threads,
        gflops={name: rate * 1e-9 for name, rate in rates.items() if rate > 0},
        gb_per_s={name: rate * 1e-9 for name, rate in loads.items()},
    )


def measure_rooflines(threads: int) -> dict[str, Roofline]:
    """Measure every instruction set that this machine and build support, slowest first; {} without the extension.

    The one in force is in force again afterwards. Cost: a second or two each; not while an operator runs.
    """
    found: dict[str, Roofline] = {}
    for name in supported_isas():
        with use_isa(name):
            roofline = measure_roofline(threads)
        if roofline is not None:
            found[name] = roofline
    return found


def level_sizes(threads: int) -> dict[str, int]:
    """Choose the bytes per thread whose loads come from each level: half a private cache, a quarter of a shared one.

    Memory is twice the last-level cache in all, so that little of it can stay there.
    """
    sizes: dict[str, int] = {}
    last = 32 << 20
    for cache in caches():
        name = cache["level"].rstrip("d")
        if cache["level"] == "L1i":
            continue
        last = cache["bytes"]
        sizes[name] = last // 2 if cache["shared_by"] == 1 else last // (4 * threads)
    return sizes | {"memory": max(2 * last, 64 << 20) // threads}


def _rate(pool: ThreadPoolExecutor, threads: int, work: Callable[[int, int], float], start: int) -> float:
    """Return the best rate (done per second, all threads together) of several runs of about 20 ms."""
    repeats = start
    done, elapsed = _together(pool, threads, work, repeats)
    if done == 0:
        return 0.0
    repeats = max(1, int(repeats * _SECONDS / max(elapsed, 1e-6)))
    results = (_together(pool, threads, work, repeats) for _ in range(_RUNS))
    return max(amount / seconds for amount, seconds in results)


def _together(
    pool: ThreadPoolExecutor, threads: int, work: Callable[[int, int], float], repeats: int
) -> tuple[float, float]:
    """Let all threads start at once; return what they did and the seconds from the start to the last end."""
    gate = threading.Barrier(threads)

    def run(thread: int) -> tuple[float, float, float]:
        gate.wait()
        start = time.perf_counter()
        return work(repeats, thread), start, time.perf_counter()

    results = list(pool.map(run, range(threads)))
    done, starts, ends = zip(*results, strict=True)
    return sum(done), max(ends) - min(starts)
