"""Count what a call does by running it in valgrind, where the processor's own counters are out of reach.

Three simulations and one count, each a run of its own:

- cachegrind with this machine's L1 and, as its last level, the L2: misses of both;
- the same with the last-level cache: what memory serves;
- the same with pages for lines and the entries of the TLBs for sets: TLB misses;
- lackey: bytes that instructions read and write, and float32 operations (it takes a vector multiply-add apart).

Valgrind knows no AVX-512, so the kernels' AVX2 path runs; one thread; prefetches are not counted and not simulated; a
last level of a size or associativity that cachegrind refuses is rounded down to the next power of two (`Geometry`).
The count of a call is the difference of two runs with different numbers of calls (`Counts.__sub__`).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nogemm.bench.profile.counts import Counts
from nogemm.errors import NativeError
from nogemm.hardware.cpu import caches, machine, usable_cores

ISA = "avx2"
LANES = 8  # of float32 in its vectors
_PAGE = 4096
# First-level data TLB for loads and second-level TLB, 4 KiB pages, as (entries, ways); virtual machines hide them.
# Source: Intel 64 and IA-32 Architectures Optimization Reference Manual, Golden Cove.
_TLBS = {(6, 143): ((96, 6), (2048, 16)), (6, 207): ((96, 6), (2048, 16))}


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The caches that are simulated, each (bytes, ways, line); `tlb` has pages for lines.

    `note` says what had to be changed for the simulator.
    """

    l1i: tuple[int, int, int]
    l1d: tuple[int, int, int]
    l2: tuple[int, int, int]
    last: tuple[int, int, int]
    tlb: tuple[tuple[int, int, int], tuple[int, int, int]] | None
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return the geometry as JSON-able values."""
        return asdict(self)


def geometry(found: Sequence[Mapping[str, Any]] | None = None, model: tuple[Any, Any] | None = None) -> Geometry:
    """Read this machine's caches, and round what cachegrind refuses.

    Raises:
        NativeError: the system does not describe its caches.
    """
    found = caches() if found is None else found
    by_level = {cache["level"]: cache for cache in found}
    if not {"L1d", "L1i", "L2"} <= by_level.keys():
        raise NativeError("the system does not say how large its caches are")
    facts = machine()
    tlbs = _TLBS.get((facts["family"], facts["model"]) if model is None else model)
    last = max((cache for cache in found if cache["level"] != "L1i"), key=lambda cache: cache["bytes"])
    wanted = {"L1i": by_level["L1i"], "L1d": by_level["L1d"], "L2": by_level["L2"], "the last level": last}
    fitted = {name: _fit(cache) for name, cache in wanted.items()}
    notes = [
        f"{name} of {cache['bytes']} bytes simulated as {fitted[name][0]} bytes, {fitted[name][1]} ways"
        for name, cache in wanted.items()
        if fitted[name][:2] != (cache["bytes"], cache["ways"])
    ]
    if tlbs is None:
        notes.append("the processor's TLBs are not known: no TLB misses")
    pages = None if tlbs is None else tuple((entries * _PAGE, ways, _PAGE) for entries, ways in tlbs)
    return Geometry(
        l1i=fitted["L1i"],
        l1d=fitted["L1d"],
        l2=fitted["L2"],
        last=fitted["the last level"],
        tlb=None if pages is None else (pages[0], pages[1]),
        note="; ".join(notes),
    )


def why_no_simulator() -> str | None:
    """Say why nothing can be simulated here; None if it can."""
    if machine()["architecture"] not in ("x86_64", "AMD64"):
        return "the simulated path is AVX2, this machine has none"
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    try:
        geometry()
    except NativeError as error:
        return str(error)
    return None


def simulate(commands: Sequence[Callable[[bool], Sequence[str]]], g: Geometry, *, pages: bool = True) -> list[Counts]:
    """Count whole runs of programs, as many at a time as there are cores.

    Args:
        commands: give command lines; the argument says that the last level is looked at, so it should begin warm. A
            call's counts are the difference of two commands' (`Counts.__sub__`).
        pages: also simulate the TLBs.
    Raises:
        NativeError: valgrind or a program failed.
    """
    views = [(g.l1i, g.l1d, g.l2), (g.l1i, g.l1d, g.last)]
    if pages and g.tlb is not None:
        views.append((g.l1i, *g.tlb))
    with ThreadPoolExecutor(usable_cores()) as pool:
        cached = [
            [pool.submit(_cachegrind, command(view[2] is g.last), *view) for view in views] for command in commands
        ]
        moved = [pool.submit(_lackey, command(False)) for command in commands]
        return [_counts([f.result() for f in found], m.result()) for found, m in zip(cached, moved, strict=True)]


def _counts(cached: Sequence[Mapping[str, float]], moved: Mapping[str, float]) -> Counts:
    near, far = cached[:2]
    pages = cached[2] if len(cached) > 2 else None
    return Counts(
        instructions=near["Ir"],
        multiply_adds=moved["multiply_adds"],
        # A multiply-add of 8 lanes from memory is 8 loads to valgrind, and one to a processor.
        accesses=near["Dr"] + near["Dw"] - moved["lane_loads"] * (LANES - 1) / LANES,
        access_bytes=moved["bytes"],
        l1_misses=near["D1mr"] + near["D1mw"],
        l2_misses=near["DLmr"] + near["DLmw"],
        llc_misses=far["DLmr"] + far["DLmw"],
        tlb_misses=None if pages is None else pages["D1mr"] + pages["D1mw"],
        page_walks=None if pages is None else pages["DLmr"] + pages["DLmw"],
    )


def _lackey(command: Sequence[str]) -> dict[str, float]:
    return parse_lackey(_valgrind(["--tool=lackey", "--basic-counts=no", "--detailed-counts=yes"], command))


def _cachegrind(command: Sequence[str], *caches_of: tuple[int, int, int]) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="nogemm-profile-") as folder:
        file = Path(folder) / "counts"
        sizes = [
            f"--{name}={','.join(map(str, cache))}" for name, cache in zip(("I1", "D1", "LL"), caches_of, strict=True)
        ]
        _valgrind(["--tool=cachegrind", "--cache-sim=yes", f"--cachegrind-out-file={file}", *sizes], command)
        return parse_cachegrind(file.read_text())


def parse_cachegrind(text: str) -> dict[str, float]:
    """Read the totals of a cachegrind file: {"Ir", "Dr", "D1mr", "DLmr", "Dw", "D1mw", "DLmw", ...}.

    Raises:
        NativeError: not such a file.
    """
    events = re.search(r"^events: (.+)$", text, re.MULTILINE)
    totals = re.search(r"^summary: ([\d ]+)$", text, re.MULTILINE)
    names = events.group(1).split() if events else []
    values = totals.group(1).split() if totals else []
    if not names or len(names) != len(values) or not {"Dr", "D1mr", "DLmr", "Dw", "D1mw", "DLmw"} <= set(names):
        raise NativeError("cachegrind wrote no totals of data accesses")
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def parse_lackey(text: str) -> dict[str, float]:
    """Read lackey's table of loads, stores and operations by type: {"bytes", "multiply_adds", "lane_loads"}.

    Valgrind executes a vector multiply-add as one operation of type F32 per lane, and its operand in memory as one load
    of that type per lane; a vector addition or load has a type of its own (V256). So what is counted are multiply-adds,
    with the few scalar operations.

    Raises:
        NativeError: no such table.
    """
    rows = re.findall(r"\s([IFV])(\d+)\s+([\d,]+)\s+([\d,]+)\s+([\d,]+)\s*$", text, re.MULTILINE)
    if not rows:
        raise NativeError("lackey wrote no table of loads and stores")
    moved = operations = lane_loads = 0
    for kind, bits, loads, stores, operated in rows:
        moved += max(int(bits) // 8, 1) * (int(loads.replace(",", "")) + int(stores.replace(",", "")))
        if (kind, bits) == ("F", "32"):
            operations, lane_loads = int(operated.replace(",", "")), int(loads.replace(",", ""))
    return {"bytes": float(moved), "multiply_adds": float(operations), "lane_loads": float(lane_loads)}


def _valgrind(options: Sequence[str], command: Sequence[str]) -> str:
    words = ["valgrind", *options, *command]
    one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    env = os.environ | one_thread | {"NOGEMM_ISA": ISA}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise NativeError(f"valgrind ended with code {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    return done.stderr


def _fit(cache: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (bytes, ways, line) with a power of two of sets; the size is rounded down to a power of two if needed."""
    size, ways, line = int(cache["bytes"]), int(cache["ways"] or 8), int(cache["line"] or 64)
    sets = size // (ways * line)
    if sets > 0 and sets & (sets - 1) == 0 and sets * ways * line == size:
        return size, ways, line
    return 1 << (size.bit_length() - 1), 16, line
