"""Commands that measure operators that stand by themselves."""

from __future__ import annotations

from typing import Annotated

import typer

from nogemm.cli.common import Json, print_partial, print_text_table
from nogemm.cli.options import Seed, integers, words
from nogemm.running.measured import measured


def topk(
    n: Annotated[str, typer.Option("--n", help="Numbers a row, with commas.")] = "8192,16384,50257,131072,262144",
    k: Annotated[str, typer.Option("--k", help="Winners, or shares such as 5%, with commas.")] = "50,256,5%",
    batch: Annotated[str, typer.Option(help="Rows a call, with commas.")] = "1,32",
    threads: Annotated[str, typer.Option(help="Of every contender, with commas.")] = "1,2",
    pattern: Annotated[
        str, typer.Option(help="Of the numbers: normal, ascending, equal, ..., with commas.")
    ] = "normal",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    recall: Annotated[float, typer.Option(help="Promised by the approximate form.")] = 0.99,
    rounds: Annotated[int, typer.Option(help="Turns of each contender.")] = 7,
    seconds: Annotated[float, typer.Option(help="Aimed at per turn.")] = 0.02,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Time the search for the k largest numbers beside torch.topk and numpy's partition."""
    from nogemm.bench.report.tables import topk_table
    from nogemm.bench.topk import TopkArgs, run_topk_bench

    args = TopkArgs(
        n=integers("--n", n),
        k=words(k),
        batch=integers("--batch", batch),
        threads=integers("--threads", threads),
        pattern=words(pattern),
        dtype=dtype,
        recall=recall,
        seed=seed,
        rounds=rounds,
        seconds=seconds,
    )

    def show(result: dict) -> None:
        print(result["machine_line"])
        print_text_table(topk_table(result))
        print_partial(result)

    measured("topk", json, lambda note, keep: run_topk_bench(args, note=note, keep=keep), show)
