"""What several commands share: the --json option, loading of models, printed tables."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nogemm.bench.models import model_directory
from nogemm.bench.tables import TextTable
from nogemm.files import write_json

Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Write the result of a command to its --json file, if one was asked for."""
    if path is not None:
        write_json(path, result)


def load_model(path: str) -> Any:
    """Load a transformers model of the class that its config names; only from the disk."""
    import transformers
    from transformers.utils import logging

    # Its bars would stand between our lines, and in front of an error's only line.
    logging.disable_progress_bar()
    path = model_directory(path)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], transformers.AutoModel) if names else transformers.AutoModel
    return cls.from_pretrained(path, local_files_only=True).eval()


def save_like(model: Any, source: str | Path, target: str | Path, tokenizer: Any) -> None:
    """Save a model with sentence-transformers' own files of `source`, so that it loads `target` as it loaded that."""
    from nogemm.convert.save import save_with

    found = Path(model_directory(source))

    def extra(folder: Path) -> None:
        for pattern in ("modules.json", "*sentence*.json", "*_Pooling", "*_Normalize"):
            for item in found.glob(pattern):
                if item.is_dir():
                    shutil.copytree(item, folder / item.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(item, folder / item.name)

    save_with(model, target, tokenizer, extra)


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
