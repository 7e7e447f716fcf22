"""What several commands share: options, printed tables."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from nogemm.bench.report.tables import TextTable
from nogemm.errors import ConfigError
from nogemm.files import write_json

Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that a model's directory brings. Read it first.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Write the result of a command to its --json file, if one was asked for."""
    if path is not None:
        write_json(path, result)


def checkout_has_papers() -> bool:
    """Tell whether `nogemm_papers` is here: an editable installation of a checkout has it, a wheel does not."""
    return importlib.util.find_spec("nogemm_papers") is not None


@contextmanager
def papers(command: str) -> Iterator[None]:
    """Import from `nogemm_papers` inside, or say in the command's name what is missing.

    Raises:
        ConfigError: it is not there.
    """
    if not checkout_has_papers():
        raise ConfigError(
            f"{command} reproduces a paper's figure, which a checkout does and a wheel does not: "
            f"run pip install -e '.[cli]' in one"
        )
    yield


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
