"""Simulate what `nogemm profile` times: every phase of the packed layer, and a dense layer, at every batch.

Legend: N tokens, D width.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from nogemm.bench.contenders.layer import COPIED_BATCH, COPIES
from nogemm.bench.engine.pool import write_pool
from nogemm.bench.profile import count_dense
from nogemm.bench.profile.count_program import count_command, count_program
from nogemm.bench.profile.counts import Counts
from nogemm.bench.profile.job import FIRST, WHOLE
from nogemm.bench.profile.simulate import Geometry, simulate
from nogemm.layers import PackedFFN

MOST_TOKENS = 1024  # of a simulated call: a block of the gather, so that larger batches do about the same per token
DENSE_TOKENS = 64  # a product's accesses per token settle sooner
_SMALL_TOKENS = 48  # at least, where one call is short
DENSE = "dense-numpy-fp32"
Key = tuple[str, str, int]


def simulate_phases(
    packed: PackedFFN,
    name: str,
    batches: Sequence[int],
    g: Geometry,
    *,
    source_ND: Tensor | None,
    seed: int,
    note: Callable[[str], None],
) -> dict[Key, Counts]:
    """Count the whole kernel and its phases: {(name, phase, batch): counts of one call}.

    Up to 8 tokens go through 12 copies of the layer in turn, as where they are timed.

    Raises:
        NativeError: no compiler, or valgrind failed.
    """
    known = packed.kernel
    assert known is not None
    names = known.phases if known.stops else None
    program = count_program()
    found: dict[Key, Counts] = {}
    with tempfile.TemporaryDirectory(prefix="nogemm-profile-") as folder:
        buffer, pool = Path(folder) / "packed", Path(folder) / "tokens"
        packed.get_buffer("packed").numpy().tofile(buffer)
        plans = {batch: plan(batch) for batch in batches}
        most = max((before + calls) * size for size, _, before, calls in plans.values())
        write_pool(pool, most, packed.d_model, seed=seed, source_ND=source_ND)
        for batch, (size, copies, before, calls) in plans.items():

            def count(phase: int, size: int = size, copies: int = copies, b: int = before, c: int = calls) -> Counts:
                commands = [
                    count_command(
                        program,
                        kind=known.number,
                        phase=phase,
                        batch=size,
                        copies=copies,
                        calls=calls,
                        packed=buffer,
                        tokens=pool,
                    )
                    for calls in (b, b + c)
                ]
                base, more = simulate(commands, g)
                return (more - base).scaled(1 / c)

            note(f"batch {batch}: simulating {name}")
            whole = count(WHOLE).scaled(batch / size)
            found[name, "kernel", batch] = whole
            if names is not None:
                note(f"batch {batch}: simulating {name}, {names[0]}")
                first = count(FIRST).scaled(batch / size)
                found[name, names[0], batch] = first
                found[name, names[1], batch] = whole - first
    return found


def simulate_dense(
    d: int, hidden: int, batches: Sequence[int], g: Geometry, note: Callable[[str], None]
) -> dict[Key, Counts]:
    """Count a dense layer as two products of numpy's matrices: {("dense-numpy-fp32", "kernel", batch): counts}."""
    sizes = sorted({min(batch, DENSE_TOKENS) for batch in batches})
    note(f"simulating a dense layer of {sizes} tokens")
    shapes = [(1, 0), *((size, 1) for size in sizes)]  # what no call does, then one call of each size
    lines = [[sys.executable, count_dense.__file__, *map(str, (d, hidden, *shape))] for shape in shapes]
    base, *whole = simulate([lambda _, line=line: line for line in lines], g, pages=False)
    by_size = {size: (counts - base).scaled(1 / size) for size, counts in zip(sizes, whole, strict=True)}
    return {(DENSE, "kernel", batch): by_size[min(batch, DENSE_TOKENS)].scaled(batch) for batch in batches}


def plan(batch: int) -> tuple[int, int, int, int]:
    """Return (tokens of a simulated call, copies, calls before counting, calls counted)."""
    size = min(batch, MOST_TOKENS)
    if batch <= COPIED_BATCH:
        rounds = -(-_SMALL_TOKENS // (batch * COPIES))
        return size, COPIES, COPIES, rounds * COPIES
    return size, 1, 0 if size >= 512 else 1, max(1, min(2, 256 // size))


def describe(batches: Sequence[int], g: Geometry) -> dict[str, Any]:
    """Say how the counts were made, for the result file."""
    return {
        "source": "cachegrind",
        "isa": "avx2",
        "geometry": g.to_dict(),
        "simulated_tokens": {str(batch): plan(batch)[0] for batch in batches},
        "copies": {str(batch): plan(batch)[1] for batch in batches},
        "dense_tokens": {str(batch): min(batch, DENSE_TOKENS) for batch in batches},
        "threads": 1,
    }
