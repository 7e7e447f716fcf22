"""The log of a run: a row every few steps, as CSV and as JSON lines, in the run's directory.

A resumed run drops the rows behind its checkpoint, so that the finished log is that of a run which nobody stopped.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nogemm.files import parse_json, write_atomically

COLUMNS: tuple[str, ...] = ("step", "tokens", "seconds", "loss", "gradient_norm", "rate")
CSV, JSONL = "log.csv", "log.jsonl"


class Journal:
    """Means of loss and gradient norm over a window of steps, written as rows.

    Args:
        directory: of the run; None: nothing is written.
        every: steps of a window.
        measured: columns that a measurement fills, behind those of every row.
    """

    def __init__(self, directory: Path | None, every: int, measured: Sequence[str] = ("validation_loss",)) -> None:
        self.directory, self.every, self.columns = directory, every, (*COLUMNS, *measured)
        self.loss = self.norm = 0.0
        self.steps = 0
        self.last = float("nan")
        """Mean loss of the last row."""

    def state(self) -> dict[str, Any]:
        """Return the open window as JSON values."""
        return {"loss": self.loss, "norm": self.norm, "steps": self.steps, "last": _number(self.last)}

    def begin(self, step: int, state: dict[str, Any] | None = None) -> None:
        """Start files anew, or go on after `step` with what `state` returned there."""
        if state is not None:
            self.loss, self.norm, self.steps = state["loss"], state["norm"], state["steps"]
            self.last = float("nan") if state["last"] is None else state["last"]
        if self.directory is None:
            return
        path = self.directory / JSONL
        lines = path.read_text(encoding="utf-8").splitlines() if state is not None and path.is_file() else []
        # At the step itself a row without a loss is the final measurement, which is made again.
        found = [row for row in map(self._row, lines) if row is not None]
        rows = [row for row in found if row["step"] < step or (row["step"] == step and row["loss"] is not None)]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
        table = io.StringIO()
        writer = csv.DictWriter(table, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.directory / CSV, table.getvalue().encode())

    def add(self, loss: float, norm: float) -> None:
        """Take one more step into the window."""
        self.loss, self.norm, self.steps = self.loss + loss, self.norm + norm, self.steps + 1

    def row(
        self, step: int, tokens: int, seconds: float, rate: float, found: Mapping[str, float] | None = None
    ) -> dict[str, Any] | None:
        """Write and return a row if the window is full or something was measured; None otherwise."""
        if self.steps < self.every and found is None:
            return None
        loss = norm = None
        if self.steps:
            loss, norm = self.loss / self.steps, self.norm / self.steps
            self.last = loss
        row: dict[str, Any] = dict.fromkeys(self.columns)
        row |= zip(COLUMNS, (step, tokens, round(seconds, 3), loss, norm, rate), strict=True)
        row |= found or {}
        self.loss, self.norm, self.steps = 0.0, 0.0, 0
        if self.directory is not None:
            with open(self.directory / JSONL, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            with open(self.directory / CSV, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        return row

    def _row(self, line: str) -> dict[str, Any] | None:
        """Read a row back; None if a kill cut it short."""
        try:
            row = parse_json(line)
        except ValueError:
            return None
        return row if isinstance(row, dict) and set(row) == set(self.columns) else None


def _number(value: float) -> float | None:
    return value if value == value else None
