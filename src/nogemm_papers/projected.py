"""`nogemm profile --project`: LookupFFN's figure 6, from a model that is fitted to phases measured here.

A few variants of the layer are timed besides the one asked for, so that the model meets shapes and dtypes that it was
not fitted to; then every scenario changes the machine or the shape, one thing at a time and all together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nogemm.bench.contenders.layer import COPIED_BATCH, COPIES, our_layer
from nogemm.bench.engine.measure import Plan, Spec, measure
from nogemm.bench.layer import LayerBenchArgs
from nogemm.bench.profile.job import FIRST, WHOLE
from nogemm.bench.profile.profile import Figures
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import caches
from nogemm.hardware.roofline import Roofline
from nogemm.layers import LookupFFN
from nogemm.projections import BHConfig
from nogemm_papers.energy import energy_figure
from nogemm_papers.forecast import LookupShape, Machine, Model, describe, fit_model

_OTHER = {"fp32": "bf16", "bf16": "fp32", "int8": "fp32"}
_HALF = {"fp32": "bf16", "bf16": "int8", "int8": "int8"}
_SMALL_BLOCK = 16
_PHASES = (("kernel", WHOLE), ("hash", FIRST))
Note = Callable[[str], None]


def check_projectable(layer: LayerBenchArgs) -> LookupFFN:
    """Return the layer that is projected.

    Raises:
        ConfigError: not a LookupFFN with BH blocks and random weights.
    """
    built = our_layer({**vars(layer), "set": list(layer.set)}) if layer.checkpoint is None else None
    if not isinstance(built, LookupFFN) or not isinstance(built.config.projection, BHConfig):
        raise ConfigError("--project knows --method lookup with a bh projection and random weights")
    return built


def variants(layer: LayerBenchArgs, built: LookupFFN) -> list[LayerBenchArgs]:
    """Return the layer and its variants: small blocks, half the tables, another dtype, both."""
    small = f"projection.block={_SMALL_BLOCK}"
    fewer = f"tables={max(1, built.config.tables // 2)}"
    other = _OTHER[layer.dtype]
    changed = [
        ((), layer.dtype),
        ((small,), layer.dtype),
        ((fewer,), layer.dtype),
        ((), other),
        ((small, fewer), other),
    ]
    return [replace(layer, set=_with(layer.set, words), dtype=dtype) for words, dtype in changed]


def project(
    layer: LayerBenchArgs,
    rows: Sequence[Mapping[str, Any]],
    roofline: Roofline,
    pool: Path,
    note: Note,
) -> dict[str, Any]:
    """Time the variants, fit the model, and run the scenarios at every batch.

    Args:
        rows: of the profile, for the layer's own phases and the dense contenders.
        pool: fresh tokens, as `write_pool` left them.
    Returns:
        {"model": factors, errors of points that were left out, all points; "scenarios": rows of {"scenario", "batch",
        "hash_us", "gather_us", "rest_us", "us", "speed_up" (the fastest dense / us), "measured_us"}}. "now" is what was
        measured; the other scenarios are the measured time times what the model says of the change.
    """
    built = check_projectable(layer)
    machine = machine_of(roofline)
    measured: list[tuple[str, LookupShape, float]] = []
    for variant in variants(layer, built):
        note(f"timing {' '.join(variant.set)} {variant.dtype}")
        measured += [(phase, s, us) for phase, s, us in _phases(variant, pool)]
    model = fit_model(measured, machine)
    known = {(phase, s): us for phase, s, us in measured}
    scenarios = []
    for batch in layer.batch:
        scenarios += run_scenarios(model, known, shape_of(layer, built, batch), machine, rows)
    return {"model": describe(model), "scenarios": scenarios}


def run_scenarios(
    model: Model,
    known: Mapping[tuple[str, LookupShape], float],
    s: LookupShape,
    machine: Machine,
    rows: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Return figure 6 at one batch; see `project`."""
    at = [row for row in rows if row["batch"] == s.batch and row["us_median"] is not None]
    rest = next((row["us_median"] for row in at if row["phase"] == "rest"), 0.0)
    dense = min((row["us_median"] for row in at if not row["contender"].startswith("nogemm")), default=None)
    cache = replace(machine, l3_bytes=float("inf"))
    wide = replace(cache, l2=2 * machine.l2, l3=2 * machine.l3)
    small, half = replace(s, block=min(_SMALL_BLOCK, s.block)), replace(s, dtype=_HALF[s.dtype])
    both = replace(small, dtype=_HALF[s.dtype])
    cases = [
        ("now", s, machine),
        ("a last-level cache that holds every layer", s, cache),
        ("twice the cache bandwidth", s, replace(machine, l2=2 * machine.l2, l3=2 * machine.l3)),
        (f"BH blocks of {small.block}", small, machine),
        (f"{half.dtype} rows and projection", half, machine),
        ("all of these", both, wide),
    ]
    found = []
    for name, shape, there in cases:
        us = {}
        for phase in ("hash", "gather"):
            factor = model.us(phase, shape, there) / model.us(phase, s, machine)
            us[phase] = known[phase, s] * factor
        total = us["hash"] + us["gather"] + rest
        real = [known.get((phase, shape)) for phase in ("hash", "gather")] if there == machine else [None]
        row = {"scenario": name, "batch": s.batch, "hash_us": us["hash"], "gather_us": us["gather"], "rest_us": rest}
        row |= {"us": total, "speed_up": None if dense is None else dense / total}
        found.append(row | {"measured_us": None if None in real else sum(t for t in real if t is not None) + rest})
    return found


def machine_of(roofline: Roofline) -> Machine:
    """Take the model's rates and sizes from what was measured; without an L3 the L2 is the last level."""
    sizes = {cache["level"]: float(cache["bytes"]) for cache in caches()}
    rates = roofline.gb_per_s
    l2 = rates.get("L2", rates["memory"])
    return Machine(
        threads=roofline.threads,
        peak_gflops=roofline.gflops["fp32"],
        l2=l2,
        l3=rates.get("L3", l2),
        memory=rates["memory"],
        l2_bytes=sizes.get("L2", 0.0),
        l3_bytes=sizes.get("L3", sizes.get("L2", 0.0)),
    )


def shape_of(layer: LayerBenchArgs, built: LookupFFN, batch: int) -> LookupShape:
    """Return the model's view of a layer at a batch."""
    projection = built.config.projection
    assert isinstance(projection, BHConfig)
    return LookupShape(
        d=built.d_model,
        d_out=built.d_out,
        tables=built.config.tables,
        bits=built.config.bits,
        block=projection.block,
        pad=projection.pad,
        rounds=projection.rounds,
        neighbours=built.config.neighbours,
        dtype=layer.dtype,
        batch=batch,
        copies=COPIES if batch <= COPIED_BATCH else 1,
    )


def _phases(layer: LayerBenchArgs, pool: Path) -> list[tuple[str, LookupShape, float]]:
    """Time hash and kernel of one variant at every batch."""
    built = check_projectable(layer)
    settings = {**vars(layer), "set": list(layer.set), "pool": str(pool), "events": False}
    job = "nogemm.bench.profile.job:PhaseContender"
    specs = [Spec(name=name, factory=job, settings=settings | {"phase": phase}) for name, phase in _PHASES]
    plan = Plan(threads=layer.threads, rounds=layer.rounds, seconds=layer.seconds)
    cases = [{"batch": batch, "cache": "fresh"} for batch in layer.batch]
    timed = measure(specs, cases, plan)
    found = []
    for batch in layer.batch:
        us = {row["contender"]: row.get("us_median") for row in timed if row["batch"] == batch}
        if us["kernel"] is not None and us["hash"] is not None:
            s = shape_of(layer, built, batch)
            found += [("hash", s, us["hash"]), ("gather", s, us["kernel"] - us["hash"])]
    return found


def _with(fields: Sequence[str], words: Sequence[str]) -> tuple[str, ...]:
    """Replace fields of the same name, keep the others."""
    names = {word.partition("=")[0] for word in words}
    return (*(field for field in fields if field.partition("=")[0] not in names), *words)


FIGURES = Figures(energy=energy_figure, check_projectable=check_projectable, project=project)
