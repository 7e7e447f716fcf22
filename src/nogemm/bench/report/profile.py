"""Charts of a profile: the roofline with every counted phase under it, and time by phase."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nogemm.bench.report.svg import Bar, bars, legend, lines, number

_LEVELS = ("L1", "L2", "L3", "memory")
_SAME = 0.1  # peaks nearer than this are one line


def profile_charts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (caption, chart) for what a profile measured; a roofline only where events were counted."""
    charts = []
    if result["points"]:
        charts.append(("Roofline: executed FLOP against bytes from the level that bounds the phase", roofline(result)))
    for batch in dict.fromkeys(row["batch"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["batch"] == batch and row["us_median"] is not None]
        data = [
            Bar(
                f"{row['contender']} {row['phase']}",
                row["us_median"],
                f"{number(row['us_median'])} us",
                0 if row["contender"] == result["settings"]["ours"] else 1,
            )
            for row in rows
        ]
        charts.append((f"Time of a call, {batch:,} tokens", bars(data)))
    return charts


def roofline(result: Mapping[str, Any]) -> str:
    """Draw bandwidths as slopes, peaks as plateaus, phases as points, on logarithmic axes."""
    machine = result["rooflines"][result["isa"]]
    points = [
        (f"{p['phase']} {p['batch']:,} ({p['bound']})", p["intensity"][_level(p)], p["gflops"])
        for p in result["points"]
    ]
    peak = machine["gflops"]["fp32"]
    low = min(x for _, x, _ in points) / 2
    high = max(max(x for _, x, _ in points) * 2, 1.5 * peak / machine["gb_per_s"]["memory"])
    series: list[tuple[str, int, list[tuple[float, float]]]] = []
    for colour, level in enumerate((name for name in _LEVELS if name in machine["gb_per_s"]), start=1):
        slope = machine["gb_per_s"][level]
        ridge = max(peak / slope, low)
        series.append((f"{level} {number(slope)} GB/s", colour, [(low, slope * low), (ridge, slope * ridge)]))
    for isa, height in _peaks(result["rooflines"]):
        series.append((f"{isa} {number(height)} GFLOP/s", 7, [(low, height), (high, height)]))
    series += [(name, 0, [(x, y)]) for name, x, y in points]
    roofs = [(name, colour) for name, colour, _ in series if colour != 0]
    chart = lines(series, x_label="FLOP per byte", y_label="GFLOP/s", height=360)
    return chart + legend([("phases (bound), see the points' titles", 0), *roofs])


def _level(point: Mapping[str, Any]) -> str:
    """The level that bounds a phase; the first for one that is bound by arithmetic."""
    return point["bound"] if point["bound"] in point["intensity"] else "L1"


def _peaks(rooflines: Mapping[str, Any]) -> list[tuple[str, float]]:
    """One line per instruction set; sets that multiply and add alike share the line of the first."""
    found: list[tuple[str, float]] = []
    for isa, machine in rooflines.items():
        height = machine["gflops"]["fp32"]
        if not any(abs(height / other - 1) < _SAME for _, other in found):
            found.append((isa, height))
    return found
