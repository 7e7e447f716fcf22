"""What calls of a layer make the machine do: accesses, misses of every level, multiply-adds; and the rates that follow.

The numbers come from hardware counters (`nogemm.hardware.counters`) or from a simulator (`simulate.py`); what a source
cannot say is None, and so is every rate that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LINE = 64  # bytes that move between two levels of cache
LEVELS = ("L1", "L2", "L3", "memory")


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Events of one call, or of a part of it.

    Attributes:
        instructions: executed.
        multiply_adds: float32 operations, a vector of n as n; a fused multiply-add is one.
        accesses: load and store instructions' accesses to data; hardware counts loads alone.
        access_bytes: what they read and wrote.
        l1_misses, l2_misses, llc_misses: accesses that the level does not serve.
        tlb_misses: accesses whose page is in no first-level data TLB.
        page_walks: of these, those that the second-level TLB does not know either.
    """

    instructions: float | None = None
    multiply_adds: float | None = None
    accesses: float | None = None
    access_bytes: float | None = None
    l1_misses: float | None = None
    l2_misses: float | None = None
    llc_misses: float | None = None
    tlb_misses: float | None = None
    page_walks: float | None = None

    def __sub__(self, other: Counts) -> Counts:
        """Return what this does beyond `other`, at least zero: two runs' start-up may differ by a few accesses."""
        return Counts(**{f.name: _less(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def scaled(self, factor: float) -> Counts:
        """Return every count times `factor`."""
        return Counts(**{name: None if v is None else v * factor for name, v in self.to_dict().items()})

    def served(self) -> dict[str, float] | None:
        """Return the bytes that each level hands inwards: {"L1", "L2", "L3", "memory"}, or None if one is unknown.

        L1: what instructions read and write; the others: a line for each miss of the level before.
        """
        found = (self.access_bytes, self.l1_misses, self.l2_misses, self.llc_misses)
        if any(value is None for value in found):
            return None
        first, *misses = (float(value) for value in found if value is not None)
        return dict(zip(LEVELS, (first, *(LINE * count for count in misses)), strict=True))

    def to_dict(self) -> dict[str, float | None]:
        """Return the counts as JSON-able values."""
        return asdict(self)


def from_dict(data: Mapping[str, Any]) -> Counts:
    """Read what `to_dict` wrote."""
    return Counts(**data)


def from_events(events: Mapping[str, float], calls: float) -> Counts:
    """Turn hardware events of `calls` calls into counts of one.

    What misses L2 is what the last level is asked for. Hardware counts loads, not their width, so bytes stay unknown.
    """
    return Counts(
        instructions=events["instructions"],
        accesses=events["l1_loads"],
        l1_misses=events["l1_misses"],
        l2_misses=events["llc_loads"],
        llc_misses=events["llc_misses"],
        tlb_misses=events["tlb_misses"],
    ).scaled(1.0 / calls)


def rates(counts: Counts | None, us: float, peak_gflops: float | None) -> dict[str, float | None]:
    """Return what Table 6 of LookupFFN gives for a phase that took `us`: utilisation, bandwidths, miss rates.

    Returns:
        fma_utilisation: 2 multiply_adds / time / peak; l1_gb_per_s, l2_gb_per_s, llc_gb_per_s, dram_gb_per_s: bytes
        that the level hands inwards / time; l1_miss_rate, tlb_miss_rate: of all accesses; llc_miss_rate: of the
        accesses that reach the last level.
    """
    counts = counts or Counts()
    served = counts.served() or {}
    flops = None if counts.multiply_adds is None else 2 * counts.multiply_adds
    names = dict(zip(LEVELS, ("l1_gb_per_s", "l2_gb_per_s", "llc_gb_per_s", "dram_gb_per_s"), strict=True))
    lines = {"L2": counts.l1_misses, "L3": counts.l2_misses, "memory": counts.llc_misses}
    found: dict[str, float | None] = {
        "fma_utilisation": None if flops is None or peak_gflops is None or us <= 0 else flops / us * 1e-3 / peak_gflops,
    }
    for level, name in names.items():
        count = lines.get(level)
        handed = served.get(level, None if count is None else LINE * count)
        found[name] = None if handed is None or us <= 0 else handed / us * 1e-3
    return found | {
        "l1_miss_rate": _ratio(counts.l1_misses, counts.accesses),
        "llc_miss_rate": _ratio(counts.llc_misses, counts.l2_misses),
        "tlb_miss_rate": _ratio(counts.tlb_misses, counts.accesses),
    }


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else max(a - b, 0.0)
