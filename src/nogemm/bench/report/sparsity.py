"""Charts of a sparsity profile: quality against neurons, candidates, unions, carriers by layer, time against batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from nogemm.bench.report.svg import Bar, bars, legend, lines, number
from nogemm.bench.sparsity.tables import mean_unions

Series = list[tuple[str, int, list[tuple[float, float]]]]


def sparsity_charts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (caption, chart) for what was measured; charts without points are left out."""
    keep = result["settings"]["keep"][0]
    charts = [
        ("What the model is worth with fewer neurons", _quality(result), "neurons that answer, %", _measure(result)),
        ("Candidates for a recall of 0.99", _candidates(result), "neurons kept, %", "candidates, % of the neurons"),
        (f"Neurons that tokens touch together, {keep:.0%} kept", _unions(result, keep), "tokens", "neurons, %"),
        *((f"Time of a call, {part['site']}", _times(part), "tokens", "us") for part in result["speed"]),
    ]
    drawn = [
        (caption, lines(series, x_label=x, y_label=y) + legend([(name, colour) for name, colour, _ in series]))
        for caption, series, x, y in charts
        if series
    ]
    if result["layers"]:
        drawn.append(("Neurons that carry 99 % of a token's energy", _carriers(result["layers"])))
    return drawn


def _measure(result: Mapping[str, Any]) -> str:
    return str((result.get("quality") or {}).get("measure") or "")


def _quality(result: Mapping[str, Any]) -> Series:
    quality = result.get("quality") or {}
    rows = [row for row in quality.get("cut", ()) if _drawable(row["value"]) and _drawable(row["best"])]
    if not rows:
        return []
    first, last = 100 * min(row["keep"] for row in rows), 100.0
    return [
        ("as HireFFN ranks", 0, [(100 * row["keep"], row["value"]) for row in rows]),
        ("ranked by what they add", 1, [(100 * row["keep"], row["best"]) for row in rows]),
        ("dense", 7, [(first, quality["dense"]), (last, quality["dense"])]),
    ]


def _candidates(result: Mapping[str, Any]) -> Series:
    found: dict[str, dict[float, list[float]]] = {}
    for layer in result["layers"]:
        for row in layer["recall"]:
            if row["target"] == 0.99:
                found.setdefault(row["sketch"], {}).setdefault(row["keep"], []).append(row["share"])
    return [
        (sketch.replace("_", " "), colour, [(100 * keep, 100 * fmean(shares)) for keep, shares in sorted(by.items())])
        for colour, (sketch, by) in enumerate(found.items())
    ]


def _unions(result: Mapping[str, Any], keep: float) -> Series:
    by = mean_unions(result).get(("kept", keep), {})
    names = (("one text", "neighbours"), ("as many texts", "strangers"), ("at random", "independent"))
    series: Series = []
    for colour, (name, which) in enumerate(names):
        points = [(float(size), 100 * share) for size, row in by.items() if (share := row[which]) and _drawable(share)]
        if points:
            series.append((name, colour, points))
    return series


def _times(part: Mapping[str, Any]) -> Series:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in part["rows"]:
        if row["us_median"] is not None:
            found.setdefault(row["contender"], []).append((float(row["batch"]), row["us_median"]))
    return [(name, 0 if name.startswith("nogemm") else 1, points) for name, points in found.items()]


def _carriers(layers: Sequence[Mapping[str, Any]]) -> str:
    shares = [(layer["site"], 100 * next(iter(layer["carriers"].values()))) for layer in layers]
    return bars([Bar(name, share, f"{number(share)} %", 0) for name, share in shares])


def _drawable(value: float) -> bool:
    """Say whether a logarithmic axis has a place for it."""
    return value > 0 and math.isfinite(value)
