"""The command `study`: a file of rows, seeds and a search for rates becomes runs, results and a table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nogemm.bench.report.runs import runs_table
from nogemm.cli.common import Json, finish, print_table, print_text_table
from nogemm.cli.options import words
from nogemm.errors import ConfigError
from nogemm.running.partial import exit_code
from nogemm.running.progress import progress


def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML file that describes the study.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results [runs/ with FILE's name].")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="In the place of the file's; of a study with tasks TASK=FILE, may be repeated."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Rows to run, with commas [all].")] = None,
    redo: Annotated[str | None, typer.Option(help="Rows to delete and run anew, with commas, or `all`.")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Make runs again that have failed.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Only say what is done, what is left, and how long.")] = False,
    max_seconds: Annotated[float | None, typer.Option(help="Stop after so long; the same command goes on.")] = None,
    json: Json = None,
) -> None:
    """Run every row and seed of FILE that has no result yet, and print their table; `nogemm report` draws it."""
    import nogemm

    rows = None if only is None else list(words(only))
    if list_:
        _list(file, output, _data(data), rows, json)
        return
    try:
        with progress.watching():
            found = nogemm.study(
                file,
                output,
                data=_data(data),
                only=rows,
                redo=words(redo or ""),
                retry=retry,
                max_seconds=max_seconds,
                note=progress,
            )
    except KeyboardInterrupt as stop:
        print(f"nogemm: {stop or 'stopped'}", file=sys.stderr)
        raise SystemExit(exit_code(stop.__cause__ if isinstance(stop.__cause__, KeyboardInterrupt) else stop)) from None
    print_text_table(runs_table(found.table))
    for note in found.table["notes"]:
        print(note)
    ended = "the time is up: " if found.stopped else ""
    print(f"{ended}{found.done} runs done, {found.failed} failed, {found.left} left; results in {found.folder}")
    finish(found.to_dict(), json)


def _data(given: list[str] | None) -> str | dict[str, str] | None:
    """Return a file, or files by task."""
    if not given:
        return None
    if len(given) == 1 and ("=" not in given[0] or Path(given[0]).exists()):
        return given[0]
    wrong = next((word for word in given if not word.partition("=")[2]), None)
    if wrong is not None:
        raise ConfigError(f"--data {wrong}: several files are given as TASK=FILE")
    return {word.partition("=")[0]: word.partition("=")[2] for word in given}


def _list(
    file: Path, output: Path | None, data: str | dict[str, str] | None, only: list[str] | None, json: Path | None
) -> None:
    from nogemm.study.listing import duration, listing
    from nogemm.study.plan import read_study
    from nogemm.study.store import Store

    plan = read_study(file, data)
    found = listing(
        Store(plan, output or Path("runs") / plan.name), [plan.row(n) for n in only] if only else list(plan.rows)
    )
    table = []
    for row in found["rows"]:
        more = "+" if row["more"] else ""
        time = "" if row["seconds"] is None else duration(row["seconds"])
        counts = [str(row[name]) for name in ("done", "failed", "left", "trials")]
        table.append([row["name"], *counts, f"{row['trials_left']}{more}", time])
    print_table(["row", "done", "failed", "left", "trials done", "left", "expected"], table)
    total = "not known before a run is done" if found["seconds"] is None else duration(found["seconds"])
    print(f"expected time of what is left: {total}")
    finish(found, json)
