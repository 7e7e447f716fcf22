"""Rows of a profile: what is timed and counted, phase by phase; and the same as points under a roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nogemm.bench.profile.counts import Counts, rates
from nogemm.hardware.roofline import Roofline

_NO_REST = "Python and torch, which run around the kernel, are not simulated"
_NO_PHASE = "the kernel cannot be stopped between its phases, so they are not simulated"
_NO_OPERATOR = "torch's profiler times an operator and counts nothing"
Key = tuple[str, str, int]


def phase_rows(
    timed: Sequence[Mapping[str, Any]],
    ours: str,
    names: tuple[str, str] | None,
    counted: Mapping[Key, Counts],
    roofline: Roofline | None,
    how: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Turn timings into one row per contender and phase.

    The second phase takes what the kernel takes longer than its first; the rest is what the module takes longer than
    its kernel: Python, the dispatcher, and fresh memory for y. A layer without a kernel has its operators instead, as
    torch's profiler timed them ("source" says so), and the rest is what they leave.
    """
    peak = None if roofline is None else roofline.gflops.get("fp32")
    rows = []
    for batch in dict.fromkeys(row["batch"] for row in timed):
        found = {row["contender"]: row for row in timed if row["batch"] == batch}
        whole, kernel = found.pop(ours), found.pop(f"{ours} kernel", None)
        rows.append(_row(ours, "whole", batch, whole))
        if kernel is not None:
            rows.append(_row(ours, "kernel", batch, kernel))
        if kernel is not None and names is not None:
            first = found.pop(f"{ours} {names[0]}")
            rows.append(_row(ours, names[0], batch, first))
            rows.append(_difference(ours, names[1], batch, kernel, first))
        if kernel is not None:
            rows.append(_difference(ours, "rest", batch, whole, kernel))
        elif "operators" in whole:
            rows += _operator_rows(ours, batch, whole)
        rows += [_row(name, "whole", batch, row) for name, row in found.items()]
    for row in rows:
        # The whole call's events are the kernel's: the rest is not counted by a simulator.
        key = (row["contender"], row["phase"], row["batch"])
        counts = counted.get(key)
        row["counted"] = counts is not None
        row |= rates(counts, row["us_median"] or 0.0, peak)
        if counts is None:
            row["why_not"] = _why_not(row, how)
    return rows


def _row(name: str, phase: str, batch: int, row: Mapping[str, Any]) -> dict[str, Any]:
    known = ("us_median", "us_p10", "us_p90", "verified", "max_error", "error", "missing", "skipped", "rounds")
    kept = {key: row.get(key) for key in known}
    return {"contender": name, "phase": phase, "batch": batch, **{k: v for k, v in kept.items() if v is not None}} | {
        key: row.get(key) for key in ("us_median", "us_p10", "us_p90")
    }


def _operator_rows(name: str, batch: int, whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    times = whole["operators"]
    rows = [_row(name, operator, batch, us) | {"source": "torch profiler"} for operator, us in times.items()]
    together = {"us_median": sum(us["us_median"] for us in times.values())}
    return [*rows, _difference(name, "rest", batch, whole, together)]


def _difference(
    name: str, phase: str, batch: int, longer: Mapping[str, Any], shorter: Mapping[str, Any]
) -> dict[str, Any]:
    a, b = longer.get("us_median"), shorter.get("us_median")
    us = None if a is None or b is None else a - b  # below zero where noise is larger than the difference
    return {"contender": name, "phase": phase, "batch": batch, "us_median": us, "us_p10": None, "us_p90": None}


def _why_not(row: Mapping[str, Any], how: Mapping[str, Any]) -> str:
    if row.get("source") == "torch profiler":
        return _NO_OPERATOR
    if how["source"] is None:
        return str(how["why_not"])
    if how["source"] == "cachegrind" and row["phase"] in ("whole", "rest"):
        return str(how.get("not_native") or _NO_REST)
    return _NO_PHASE if how["source"] == "cachegrind" else "not counted"


def roofline_points(
    rows: Sequence[Mapping[str, Any]], counted: Mapping[Key, Counts], roofline: Roofline | None
) -> list[dict[str, Any]]:
    """Place every counted phase under the roofline of the instruction set that was timed.

    Returns:
        rows of {"contender", "phase", "batch", "gflops" (executed float32 operations / time), "intensity": {level:
        FLOP per byte that the level hands inwards}, "bound", "roofline_fraction" (least time / time)}. The least time
        is that of `Roofline.bound`; a phase without float operations is not a point.
    """
    found = []
    for row in rows:
        counts = counted.get((row["contender"], row["phase"], row["batch"]))
        served = None if counts is None else counts.served()
        us = row["us_median"]
        if counts is None or served is None or not counts.multiply_adds or roofline is None:
            continue
        if us is None or us <= 0:
            continue
        flops = 2 * counts.multiply_adds
        least, bound = roofline.bound({"fp32": flops}, {k: v for k, v in served.items() if k in roofline.gb_per_s})
        point = {name: row[name] for name in ("contender", "phase", "batch")}
        point |= {"gflops": flops / us * 1e-3, "bound": bound, "roofline_fraction": least / us}
        found.append(point | {"intensity": {level: flops / moved for level, moved in served.items() if moved > 0}})
    return found
