"""`nogemm bench serve`: a served encoder under load."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, print_partial, print_text_table
from nogemm.cli.options import Threads, integers, words
from nogemm.running.measured import measured


def serve(
    model: Annotated[str, typer.Option(help="Converted encoder.")],
    dense: Annotated[str, typer.Option(help="The dense one.")] = "all-MiniLM-L6-v2",
    against: Annotated[str | None, typer.Option(help="Contenders, with commas, the first is the base.")] = None,
    clients: Annotated[str, typer.Option(help="That ask at the same time, with commas.")] = "1,8,64",
    texts: Annotated[int, typer.Option(help="Texts of a request.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens that texts are cut to.")] = 64,
    folder: Annotated[str | None, typer.Option(help="Where exports are kept and found again.")] = None,
    workers: Annotated[int, typer.Option(help="Processes of each server.")] = 1,
    threads: Threads = 0,
    rounds: Annotated[int, typer.Option(help="Turns of each contender in each case.")] = 7,
    seconds: Annotated[float, typer.Option(help="Of a turn.")] = 3.0,
    json: Json = None,
) -> None:
    """Time a served encoder: texts a second and waiting times, beside the same server with the dense model."""
    from nogemm.bench.report.tables import serve_table
    from nogemm.bench.serve import DEFAULT, ServeBenchArgs, run_serve_bench

    args = ServeBenchArgs(
        model=model,
        dense=dense,
        against=DEFAULT if against is None else words(against),
        clients=integers("--clients", clients),
        texts=texts,
        tokens=tokens,
        folder=folder,
        workers=workers,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
    )

    def show(result: dict[str, Any]) -> None:
        print(result["machine_line"])
        print_text_table(serve_table(result))
        print_partial(result)

    measured("serve", json, lambda note, keep: run_serve_bench(args, note=note, keep=keep), show)
