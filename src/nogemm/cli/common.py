"""What several commands share: options, saving of models, printed tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nogemm.bench.report.tables import TextTable
from nogemm.files import write_json
from nogemm.models.directory import copy_modules, model_directory, sentence_modules

Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that a model's directory brings. Read it first.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Write the result of a command to its --json file, if one was asked for."""
    if path is not None:
        write_json(path, result)


def save_like(model: Any, source: str | Path, target: str | Path, tokenizer: Any) -> None:
    """Save a model with sentence-transformers' own files of `source`, so that it loads `target` as it loaded that."""
    from nogemm.convert.save import save_with

    root = model_directory(source)
    sentence_modules(root)  # refuses before anything is written
    save_with(model, target, tokenizer, lambda folder: copy_modules(root, folder))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns: the first to the left, the others to the right."""
    table = [list(head), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())


def print_partial(result: Mapping[str, Any]) -> None:
    """Say of a result that was cut short that it was."""
    if result.get("partial"):
        print(f"partial: {result['reason']}")


def print_text_table(table: TextTable) -> None:
    """Print a table of a result, and what its figures mean."""
    print_table(table.head, table.rows)
    print(table.hint)
