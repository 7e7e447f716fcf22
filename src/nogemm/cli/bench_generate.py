"""`nogemm bench generate`: an exported decoder beside the engines that people use instead."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, print_partial, print_text_table
from nogemm.cli.options import Rounds, Seconds, Threads, words
from nogemm.running.measured import measured


def generate(
    model: Annotated[str, typer.Option(help="A decoder: directory, hub name or GGUF file.")],
    data: Annotated[str, typer.Option(help="Texts that codes fit, and others to read and continue.")] = "sample",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens that follow it.")] = 64,
    text: Annotated[int, typer.Option(help="Tokens that perplexity is taken on.")] = 384,
    against: Annotated[str | None, typer.Option(help="Contenders, with commas, the first is the base.")] = None,
    folder: Annotated[str | None, typer.Option(help="Where exported models are kept and found again.")] = None,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.5,
    json: Json = None,
) -> None:
    """Time greedy generation of a whole decoder: exported with an exact head, and other engines with dense ones."""
    from nogemm.bench.generate import CONTENDERS, GenerateArgs, run_generate_bench
    from nogemm.bench.report.tables import generate_table
    from nogemm.train.sources import texts

    args = GenerateArgs(
        model=model,
        prompt=prompt,
        new_tokens=new_tokens,
        text=text,
        against=CONTENDERS if against is None else words(against),
        folder=folder,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
    )

    def show(result: dict[str, Any]) -> None:
        print(result["machine_line"])
        print_text_table(generate_table(result))
        print_partial(result)

    measured("generate", json, lambda note, keep: run_generate_bench(args, texts(data), note=note, keep=keep), show)
