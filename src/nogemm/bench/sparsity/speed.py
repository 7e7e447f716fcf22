"""The speed of a HireFFN of a site's own weights beside the dense layer: predicted by the roofline, and measured.

Legend: D width, E output width, F neurons, B tokens of a call.
Reading order: `measure_speed`, `predictions`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from nogemm.bench import peers
from nogemm.bench.contenders.layer import COPIES, dense_work
from nogemm.bench.contenders.site import store
from nogemm.bench.engine.measure import Plan, Spec, measure
from nogemm.bench.engine.pool import pool_size, write_pool
from nogemm.bench.layer import weight_level
from nogemm.bench.sparsity.layer import Found, kept_count
from nogemm.convert.sites import Site
from nogemm.hardware.roofline import Roofline
from nogemm.running.measured import Note

_ITEMSIZE = {"fp32": 4, "bf16": 2, "int8": 1}


def measure_speed(
    site: Site, found: Found, x_ND: Tensor, *, dtype: str, batch: Sequence[int], plan: Plan, seed: int, note: Note
) -> list[dict[str, Any]]:
    """Time the site's HireFFN at every share that is kept beside torch's dense layer in the same dtype.

    Twelve copies of each take turns, as the layers of a model do; tokens are the site's own, drawn from all texts.

    Returns:
        rows as of `nogemm bench layer`, with "keep" (None: dense) and "speed_up", the dense layer's median / its own.
    """
    dense_name = f"torch-{dtype}"
    with tempfile.TemporaryDirectory(prefix="nogemm-sparsity-") as folder:
        pool, weights = Path(folder) / "tokens", Path(folder) / "weights.safetensors"
        size = pool_size(site.d_in, largest_call=COPIES * max(batch) * 2)
        write_pool(pool, size.tokens, site.d_in, seed=seed + 1, source_ND=x_ND)
        store(found.layer, weights)
        common = {"pool": str(pool), "d": site.d_in, "hidden": site.hidden, "activation": site.activation}
        common |= {"gated": site.gated, "seed": seed, "dtype": dtype}
        specs = []
        for keep, candidates in found.candidates.items():
            oversample = max(1.0, candidates / kept_count(site.hidden, keep))
            config = {"keep": keep, "sketch": found.layer.config.sketch, "oversample": oversample}
            ours = {"weights": str(weights), "config": config, "shape": asdict(site.shape)}
            factory = "nogemm.bench.contenders.site:SiteContender"
            specs.append(Spec(name=our_name(dtype, keep), factory=factory, settings=common | ours))
        factory = "nogemm.bench.contenders.site:SiteDense"
        settings = common | {"engine": dense_name}
        specs.append(Spec(name=dense_name, factory=factory, settings=settings, missing=peers.missing(dense_name)))
        cases = [{"batch": size, "cache": "fresh"} for size in batch]
        rows: list[dict[str, Any]] = [dict(row) for row in measure(specs, cases, plan, note=note)]
    keeps = {our_name(dtype, keep): keep for keep in found.candidates}
    dense = {row["batch"]: row.get("us_median") for row in rows if row["contender"] == dense_name}
    for row in rows:
        us, other = row.setdefault("us_median", None), dense[row["batch"]]
        row["keep"] = keeps.get(row["contender"])
        row["speed_up"] = other / us if us and other else None
    return rows


def our_name(dtype: str, keep: float) -> str:
    """Name our contender."""
    return f"nogemm-{dtype} keep {keep:g}"


def predictions(
    site: Site, found: Found, roofline: Roofline, *, dtype: str, batch: Sequence[int]
) -> list[dict[str, Any]]:
    """Predict the least time of both layers on this machine, for B tokens of as many texts.

        time = max(FLOP of a precision / its peak, bytes / bandwidth of the cache that holds the weights, or memory)

    Bytes are the sketch and the rows that the tokens together touch, as their unions were measured.

    Returns:
        rows of {"keep", "batch", "dense_us", "us", "speed_up", "bound"}.
    """
    layer, item = found.layer, _ITEMSIZE[dtype]
    wide, last = site.d_in, site.d_out + site.d_in * site.gated
    sketch_bytes, _ = layer.traffic(1)
    stored = sketch_bytes + site.hidden * (wide + last) * item
    rows = []
    for (keep, size), (kept, candidates) in found.touched.items():
        if size not in batch:
            continue
        flops, read = dense_work(wide, site.hidden, size, dtype, site.gated)
        dense_us, _ = roofline.bound({dtype: flops}, _read(read, read, roofline))
        each = found.candidates[keep] * wide + kept_count(site.hidden, keep) * last
        sketch_flops = 2.0 * size * sketch_numbers(found)
        work = {"int8": sketch_flops, "fp32": 2.0 * size * each}
        read = sketch_bytes + (candidates * wide + kept * last) * item
        us, bound = roofline.bound(work, _read(read, stored, roofline))
        rows.append(
            {"keep": keep, "batch": size, "dense_us": dense_us, "us": us} | {"speed_up": dense_us / us, "bound": bound}
        )
    return rows


def sketch_numbers(found: Found) -> int:
    """Count the multiply-adds of the sketch for one token."""
    sketch = found.layer.sketch()
    reduce = 0 if sketch.reduce_RD is None else sketch.reduce_RD.numel()
    return sketch.codes_FR.numel() + reduce


def _read(size: float, stored: float, roofline: Roofline) -> dict[str, float]:
    """Say from where bytes are read: twelve layers of `stored` bytes lie in the nearest cache that holds them all."""
    level = weight_level(stored * COPIES)
    return {level: size} if level in roofline.gb_per_s else {"memory": size}
