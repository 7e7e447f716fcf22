"""A simple model of a LookupFFN's time, fitted to measured phases, and what it says of other machines and shapes.

    t(phase) = sum_j c_j work_j / rate_j,   c_j >= 0

    hash:    arithmetic slots / peak, weights streamed once per tile of tokens / their level, one per call
    gather:  all rows read / L2, distinct rows / the last level or memory, one per call

Work follows from shapes, rates are the measured roofline, so a change of either is a change of the sum: a c_j near 1
says that the part runs at the machine's speed, above 1 how far it is from it. The error that counts is that of a point
which the fit has not seen (`left_out`).

Legend: N tokens, D padded width, T tables, K bits, R = 2^K, m rounds, r repeats, B block width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nogemm.cost import distinct_rows
from nogemm.ops.hadamard import hadamard_flops
from nogemm.projections._padded import padded_width

FEATURES = {"hash": ("arithmetic", "weights", "call"), "gather": ("rows from L2", "distinct rows", "call")}
# What the kernels do (csrc/kernels/lookup_forward.h): tokens per tile by batch, tokens per block of the gather.
_TILES = ((16, 4), (63, 16), (1023, 32), (1 << 60, 48))
_FUSED, _BLOCK = 1023, {4: 4096, 2: 1376, 1: 1376}
_EXPONENTIAL = 7  # multiply-adds per bit, for its sigmoid


@dataclass(frozen=True, kw_only=True)
class LookupShape:
    """A packed LookupFFN with a BH projection, and a batch through `copies` such layers in turn."""

    d: int
    d_out: int
    tables: int
    bits: int
    block: int
    rounds: int
    neighbours: int
    dtype: str
    batch: int
    copies: int
    pad: str = "power_of_two"

    @property
    def width(self) -> int:
        """D: d as the projection pads it."""
        return padded_width(self.d, self.block, self.pad)

    @property
    def itemsize(self) -> int:
        """Bytes of a table's number."""
        return {"fp32": 4, "bf16": 2, "int8": 1}[self.dtype]

    @property
    def table_bytes(self) -> float:
        """Bytes of the tables of all copies."""
        return float(self.copies * self.tables * 2**self.bits * self.d_out * self.itemsize)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of all threads together: 1e9 per second; sizes in bytes; factors a scenario changes."""

    threads: int
    peak_gflops: float
    l2: float
    l3: float
    memory: float
    l2_bytes: float
    l3_bytes: float

    def level_time(self, moved: float, held: float) -> float:
        """Return us for `moved` bytes out of a working set of `held`: what does not fit comes from the next level."""
        if held <= self.l2_bytes:
            return moved / self.l2 * 1e-3
        share = min(1.0, self.l3_bytes / held)
        return moved * (share / self.l3 + (1 - share) / self.memory) * 1e-3


def features(phase: str, s: LookupShape, machine: Machine) -> list[float]:
    """Return the model's terms, in us: the time of each part at the machine's full rate."""
    tile = next(tokens for most, tokens in _TILES if s.batch <= most)
    if s.batch < 2 * tile:
        tile = max(1, min(tile, (s.batch + 1) // 2)) if s.batch <= 16 else tile
    pieces = -(-s.batch // tile)
    slower = machine.threads / min(machine.threads, pieces)  # a batch of one piece runs on one thread
    if phase == "hash":
        return [slower * _slots(s) * 2 / machine.peak_gflops * 1e-3, slower * _weights(s, pieces, machine), 1.0]
    row = s.d_out * s.itemsize
    blocks = 1 if s.batch <= _FUSED else max(1, round(s.batch / _BLOCK[s.itemsize]))
    near = s.batch * s.tables * s.neighbours * row
    distinct = blocks * s.tables * distinct_rows(s.batch * s.neighbours / blocks, 2**s.bits) * row
    return [slower * near / machine.l2 * 1e-3, slower * machine.level_time(distinct, s.table_bytes), 1.0]


def _slots(s: LookupShape) -> float:
    """Lane operations of the hash: a product of 16-bit pairs is one for two multiply-adds."""
    repeats = -(-s.tables * s.bits // s.width)
    block = max(s.block, 16)
    first = -(-s.d // block) * block  # padding is skipped in the first round
    products = repeats * block * (first + (s.rounds - 1) * s.width) * (1.0 if s.dtype == "fp32" else 0.5)
    butterflies = repeats * s.rounds * block * hadamard_flops(max(1, s.width // block))
    return s.batch * (products + butterflies + _EXPONENTIAL * s.tables * s.bits)


def _weights(s: LookupShape, pieces: int, machine: Machine) -> float:
    repeats = -(-s.tables * s.bits // s.width)
    size = repeats * s.rounds * s.width * max(s.block, 16) * (4 if s.dtype == "fp32" else 2)
    return machine.level_time(float(size * pieces), float(size * s.copies))


def fit(terms: np.ndarray, us: np.ndarray) -> np.ndarray:
    """Return c >= 0 of least relative squared error of terms @ c against us [points].

    Coordinate descent: the problem is convex and tiny.
    """
    a = terms / us[:, None]
    scale = np.maximum(np.sqrt((a * a).sum(0)), 1e-30)
    a = a / scale
    c = np.zeros(a.shape[1])
    for _ in range(2000):
        before = c.copy()
        for j in range(len(c)):
            rest = 1.0 - a @ c + a[:, j] * c[j]
            c[j] = max(0.0, float(a[:, j] @ rest) / max(float(a[:, j] @ a[:, j]), 1e-30))
        if np.abs(c - before).max() < 1e-12:
            break
    return c / scale


def left_out(terms: np.ndarray, us: np.ndarray, groups: Sequence[object]) -> np.ndarray:
    """Return for each point what a fit to the other groups' points says of it: a group is left out as a whole."""
    said = np.zeros(len(us))
    for group in dict.fromkeys(groups):
        out = np.array([other == group for other in groups])
        if out.all():
            raise ValueError("one group alone cannot be left out")
        said[out] = terms[out] @ fit(terms[~out], us[~out])
    return said


@dataclass(frozen=True, kw_only=True)
class Model:
    """Factors c of both phases, and the errors of points that their fit had not seen."""

    factors: dict[str, np.ndarray]
    points: list[dict[str, Any]]

    def us(self, phase: str, s: LookupShape, machine: Machine) -> float:
        """Return the time of a phase."""
        return float(np.dot(features(phase, s, machine), self.factors[phase]))

    def errors(self) -> dict[str, dict[str, float]]:
        """Return median and worst relative error of left-out points, by phase."""
        found = {}
        for phase in self.factors:
            each = [abs(p["us_left_out"] / p["us"] - 1) for p in self.points if p["phase"] == phase]
            found[phase] = {"median": float(np.median(each)), "worst": float(max(each)), "points": len(each)}
        return found


def fit_model(measured: Sequence[tuple[str, LookupShape, float]], machine: Machine) -> Model:
    """Fit both phases to (phase, shape, us); a shape's batches are left out together.

    Raises:
        ValueError: a phase with one shape alone, or no positive time.
    """
    factors, points = {}, []
    for phase in FEATURES:
        own = [(s, us) for name, s, us in measured if name == phase and us > 0]
        if not own:
            raise ValueError(f"no measured {phase}")
        terms = np.array([features(phase, s, machine) for s, _ in own])
        us = np.array([time for _, time in own])
        factors[phase] = fit(terms, us)
        groups = [(s.d, s.tables, s.bits, s.block, s.dtype) for s, _ in own]
        said, all_said = left_out(terms, us, groups), terms @ factors[phase]
        for (s, time), out, known in zip(own, said, all_said, strict=True):
            shape = {"tables": s.tables, "bits": s.bits, "block": s.block, "dtype": s.dtype, "batch": s.batch}
            times = {"us": time, "us_fitted": float(known), "us_left_out": float(out)}
            points.append({"phase": phase, **shape, **times})
    return Model(factors=factors, points=points)


def describe(model: Model) -> dict[str, Any]:
    """Return the model as JSON-able values."""
    named: Mapping[str, Any] = {
        phase: dict(zip(FEATURES[phase], map(float, c), strict=True)) for phase, c in model.factors.items()
    }
    return {"factors": named, "errors_left_out": model.errors(), "points": model.points}
