"""Results that are one table each, as text: the same rows for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table ready to be shown: its first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    hint: str


def projections_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench projections` measured."""
    rows = []
    for row in result["rows"]:
        theory = ["", ""]
        if row["closed_form"] is not None:
            theory = [f"{row['closed_form']:.4f}", f"{100 * row['deviation']:+.2f} %"]
        figures = [f"{row['flops'] / 1000:.1f}", f"{row['parameters']:,}", f"{row['error']:.4f}"]
        rows.append([f"{row['projection']}: {row['label']}", *figures, *theory, row["fit"]])
    return TextTable(
        title="Projections",
        head=["projection", "kFLOP", "parameters", "error", "closed form", "deviation", "fit"],
        rows=rows,
        hint=f"Relative squared error of the best fit to a Gaussian matrix of width {result['settings']['d']}.",
    )
