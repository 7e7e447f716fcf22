"""The result of a search in a report: agreement against time with every rival, and how far its guesses were off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nogemm.bench.engine.result import why_not
from nogemm.bench.report.svg import Point, number, scatter
from nogemm.bench.report.tables import TextTable

KINDS = {"candidate": 0, "dense": 1, "rival": 2, "static": 3}
NEEDED = ("rows", "front", "chosen", "verdict", "budget", "shape", "checks", "space", "seconds")


def tune_title(result: Mapping[str, Any]) -> str:
    """Name the search."""
    return f"Search: {result['settings']['model']}, {_budget(result)}"


def tune_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out the rows, the fastest first: who is on the front, who is chosen."""
    rows = []
    for row in sorted(result["rows"], key=lambda row: row["us_median"] or float("inf")):
        marks = "chosen" if row["name"] == result["chosen"] else "front" if row["name"] in result["front"] else ""
        figure = row["agreement"]
        agreement = (
            ["", ""] if figure is None else [f"{figure['value']:.4f}", f"{figure['low']:.4f}-{figure['high']:.4f}"]
        )
        time = why_not(row) or "not run" if row["us_median"] is None else f"{row['us_median'] / 1e3:.4g}"
        size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.1f}"
        tokens = f"{row['tokens']:,}" if row["tokens"] else ""
        rows.append([row["name"], row["engine"], time, *agreement, size, tokens, marks])
    batch, length = result["shape"]
    checks = [
        f"{what} {number(100 * worst, 2)} %"
        for what, worst in (
            ("times of whole candidates were guessed within", result["checks"]["latency"].get("worst")),
            ("of those in the table within", result["checks"]["final"].get("worst")),
        )
        if worst is not None
    ]
    hint = f"Milliseconds a call of {batch} x {length} tokens; agreement on held-out texts (95 %); MB of weights."
    if checks:
        hint += " " + "; ".join(checks).capitalize() + "."
    head = ["model", "engine", "ms", "agreement", "interval", "MB", "tokens", ""]
    return TextTable(title=f"Agreement against time: {_budget(result)}", head=head, rows=rows, hint=hint)


def tune_chart(result: Mapping[str, Any]) -> str:
    """Draw agreement against time; a candidate that was distilled for a short time alone is hollow."""
    points = [
        Point(
            x=row["us_median"] / 1e3,
            y=row["agreement"]["value"],
            label=row["name"],
            series=KINDS[row["kind"]],
            low=row["agreement"]["low"],
            high=row["agreement"]["high"],
            hollow=row["training"] == "short",
        )
        for row in result["rows"]
        if row["us_median"] is not None and row["agreement"] is not None
    ]
    return scatter(points, x_label="ms a call", y_label="agreement") if points else ""


def _budget(result: Mapping[str, Any]) -> str:
    value = result["budget"]["value"]
    return {
        "quality": f"the fastest with an agreement of {value:g} or more",
        "latency_ms": f"the best within {value:g} ms",
        "memory_mb": f"the best within {value:g} MB",
    }[result["budget"]["name"]]
