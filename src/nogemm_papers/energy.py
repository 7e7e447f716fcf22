"""Estimate the energy of a layer's memory accesses from bytes served per level, as LookupFFN's paper does.

    E = sum over L1, L2, L3 of bytes * SRAM + bytes from memory * DRAM

Only accesses: no arithmetic, no idle power, no refresh. Bytes are those that a level hands inwards, so a line that
comes from memory pays DRAM once, and SRAM in each cache that it passes. The constants are the paper's, for 64 bits; it
names Horowitz (2014) and Jouppi et al. (2021) as their source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from nogemm.bench.profile.counts import Counts

PAPER = "LookupFFN (Zeng et al., 2023), section 1, after Horowitz (2014) and Jouppi et al. (2021)"


@dataclass(frozen=True, kw_only=True)
class EnergyConstant:
    """One row of the table of constants: picojoules for an access of 64 bits, from `low` to `high`."""

    what: str
    low: float
    high: float
    source: str


CONSTANTS = {
    "SRAM": EnergyConstant(what="any cache", low=14.0, high=14.0, source=PAPER),
    "DRAM": EnergyConstant(what="memory", low=300.0, high=450.0, source=PAPER),
}
CLAIMED_L1_HITS = 0.8  # "nearly 80% L1 cache hit rate", the same section


def constants() -> dict[str, dict[str, Any]]:
    """Return the table as JSON-able values."""
    return {name: asdict(entry) for name, entry in CONSTANTS.items()}


def energy(counts: Counts, tokens: float) -> dict[str, Any] | None:
    """Return nanojoules per token, or None where a level's bytes are unknown.

    Returns:
        sram_nj, dram_nj_low, dram_nj_high, nj_low, nj_high; by_level {"L1", ...}: nJ, DRAM in the middle of its range;
        l1_hit_rate: share of accesses that find their line in L1; l1_byte_rate: share of the bytes read and written
        that did not have to come from beyond it; sram_rate: share of accesses that no level below the caches served.
    """
    served = counts.served()
    if served is None or not counts.accesses or not counts.access_bytes:
        return None
    assert counts.l1_misses is not None
    assert counts.llc_misses is not None
    each = {level: moved / 8 / tokens * 1e-3 for level, moved in served.items()}  # thousands of 64-bit accesses
    sram = {level: each[level] * CONSTANTS["SRAM"].low for level in ("L1", "L2", "L3")}
    dram = CONSTANTS["DRAM"]
    low, high = each["memory"] * dram.low, each["memory"] * dram.high
    total = sum(sram.values())
    return {
        "sram_nj": total,
        "dram_nj_low": low,
        "dram_nj_high": high,
        "nj_low": total + low,
        "nj_high": total + high,
        "by_level": sram | {"memory": (low + high) / 2},
        "l1_hit_rate": 1 - counts.l1_misses / counts.accesses,
        "l1_byte_rate": max(0.0, 1 - served["L2"] / counts.access_bytes),
        "sram_rate": 1 - counts.llc_misses / counts.accesses,
    }


def energy_figure(counted: Mapping[tuple[str, str, int], Counts]) -> dict[str, Any]:
    """Return what a profile says of energy: {"constants", "claimed_l1_hit_rate", "rows"}, see `energy_rows`."""
    return {"constants": constants(), "claimed_l1_hit_rate": CLAIMED_L1_HITS, "rows": energy_rows(counted)}


def energy_rows(counted: Mapping[tuple[str, str, int], Counts]) -> list[dict[str, Any]]:
    """Estimate every counted phase; (contender, phase, batch) name it, and counts are of one call.

    Returns:
        rows of {"contender", "phase", "batch"} and `energy`; ours also have "dense_ratio": [least, most], the dense
        layer's energy divided by theirs at the same batch, where that was counted.
    """
    rows = []
    for (contender, phase, batch), counts in counted.items():
        found = energy(counts, batch)
        if found is not None:
            rows.append({"contender": contender, "phase": phase, "batch": batch, **found})
    dense = {row["batch"]: row for row in rows if row["contender"].startswith("dense")}
    for row in rows:
        other = dense.get(row["batch"])
        if other is not None and other is not row:
            ratios = [other[key] / row[key] for key in ("nj_low", "nj_high")]
            row["dense_ratio"] = [min(ratios), max(ratios)]
    return rows
