"""What `nogemm profile` measured as tables of text: phases, energy, projection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nogemm.bench.engine.result import why_not
from nogemm.bench.report.tables import TextTable

_RATES = (
    ("fma_utilisation", "FMA", 100.0, "%"),
    ("l1_gb_per_s", "L1 GB/s", 1.0, ""),
    ("l2_gb_per_s", "L2 GB/s", 1.0, ""),
    ("llc_gb_per_s", "LLC GB/s", 1.0, ""),
    ("dram_gb_per_s", "DRAM GB/s", 1.0, ""),
    ("l1_miss_rate", "L1 miss", 100.0, "%"),
    ("llc_miss_rate", "LLC miss", 100.0, "%"),
    ("tlb_miss_rate", "TLB miss", 100.0, "%"),
)


def profile_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out the phases: time, utilisation, bandwidths, miss rates."""
    rows = []
    for row in result["rows"]:
        us = row["us_median"]
        cells = [row["contender"], row["phase"], f"{row['batch']:,}"]
        cells.append(why_not(row) if us is None else f"{us:.4g}")
        cells += ["" if row[name] is None else f"{row[name] * scale:.3g}{unit}" for name, _, scale, unit in _RATES]
        rows.append(cells)
    head = ["contender", "phase", "batch", "us", *(title for _, title, _, _ in _RATES)]
    return TextTable(title=f"Profile: {shape_line(result)}", head=head, rows=rows, hint=source_line(result))


def energy_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out the energy estimate: nanojoules per token by level, and hit rates; no rows where none was made."""
    rows = []
    energy = result["energy"] or {"rows": [], "constants": {}}
    for row in energy["rows"]:
        levels = [f"{row['by_level'][level]:.4g}" for level in ("L1", "L2", "L3", "memory")]
        ratio = row.get("dense_ratio")
        rows.append(
            [
                row["contender"],
                row["phase"],
                f"{row['batch']:,}",
                *levels,
                f"{row['nj_low']:.4g} to {row['nj_high']:.4g}",
                f"{100 * row['l1_hit_rate']:.1f}%",
                f"{100 * row['l1_byte_rate']:.1f}%",
                "" if ratio is None else f"{ratio[0]:.2f} to {ratio[1]:.2f}",
            ]
        )
    head = [
        "contender",
        "phase",
        "batch",
        "L1 nJ",
        "L2",
        "L3",
        "memory",
        "nJ/token",
        "L1 hits",
        "L1 bytes",
        "dense / it",
    ]
    found = energy["constants"]
    said = [f"{_range(entry['low'], entry['high'])} pJ per 64 bits from {entry['what']}" for entry in found.values()]
    source = "; ".join(dict.fromkeys(entry["source"] for entry in found.values()))
    hint = f"Accesses alone: {'; '.join(said)} ({source}). memory: the middle of its range."
    return TextTable(title=f"Energy of accesses: {shape_line(result)}", head=head, rows=rows, hint=hint)


def projection_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out the scenarios of `--project`; no rows without it."""
    found = result.get("projection")
    rows = [
        [
            row["scenario"],
            f"{row['batch']:,}",
            *(f"{row[name]:.4g}" for name in ("hash_us", "gather_us", "rest_us", "us")),
            "" if row["measured_us"] is None else f"{row['measured_us']:.4g}",
            "" if row["speed_up"] is None else f"{row['speed_up']:.2f}",
        ]
        for row in (found["scenarios"] if found else ())
    ]
    head = ["scenario", "batch", "hash us", "gather us", "rest us", "us", "measured us", "dense / it"]
    hint = ""
    if found:
        errors = found["model"]["errors_left_out"]
        each = [
            f"{phase} {100 * e['median']:.0f}% (median), {100 * e['worst']:.0f}% (worst)" for phase, e in errors.items()
        ]
        hint = f"The model's error on shapes that it was not fitted to: {'; '.join(each)}."
    return TextTable(title=f"Projection: {shape_line(result)}", head=head, rows=rows, hint=hint)


def _range(low: float, high: float) -> str:
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def shape_line(result: Mapping[str, Any]) -> str:
    """Name the layer that was profiled."""
    s = result["settings"]
    fields = f" {' '.join(s['set'])}" if s["set"] else ""
    return f"{s['method']} d={s['d']}{fields} {s['dtype']}, {s['threads']} threads"


def source_line(result: Mapping[str, Any]) -> str:
    """Say where the events come from."""
    how = result["counting"]
    if how["source"] is None:
        return f"Times alone, no events: {how['why_not']}."
    if how["source"] == "perf":
        return "Events: hardware counters."
    simulated = f"Events: cachegrind and lackey on the {how['isa']} path, one thread"
    notes = [text for text in (how["geometry"]["note"], how["why_not"], how.get("not_native", "")) if text]
    return f"{simulated}; times: {result['isa']}. {'. '.join(notes)}"
