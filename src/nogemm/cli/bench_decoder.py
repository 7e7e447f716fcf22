"""`nogemm bench decoder`, added to the other commands that measure."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nogemm.cli.bench import print_rows
from nogemm.cli.common import Json
from nogemm.cli.options import Rounds, Seconds, Seed, Threads, Width, words
from nogemm.running.measured import measured


def decoder(
    d: Width = 2048,
    hidden: Annotated[int, typer.Option(help="Neurons of an FFN.")] = 8192,
    layers: Annotated[int, typer.Option(help="Layers of the decoder.")] = 24,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 32,
    vocabulary: Annotated[int, typer.Option(help="Rows of its head.")] = 50272,
    active: Annotated[float, typer.Option(help="Share of the neurons that fire for a token.")] = 0.05,
    sketch: Annotated[str, typer.Option(help="Of our FFNs: int8 or int4.")] = "int4",
    prompt: Annotated[int, typer.Option(help="Tokens in the cache when decoding begins.")] = 32,
    against: Annotated[str | None, typer.Option(help="Dense engines, with commas [a choice of all].")] = None,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.3,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Time a whole ReLU decoder of random weights, token by token, beside dense decoders of other engines."""
    from nogemm.bench.decoder import AGAINST, DecoderArgs, run_decoder_bench

    args = DecoderArgs(
        d=d,
        hidden=hidden,
        layers=layers,
        heads=heads,
        vocabulary=vocabulary,
        active=active,
        sketch=sketch,
        prompt=prompt,
        against=AGAINST if against is None else words(against),
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        seed=seed,
    )

    def show(result: dict[str, Any]) -> None:
        print_rows(result, ("batch",), "ms", 1e3)

    measured("decoder", json, lambda note, keep: run_decoder_bench(args, note=note, keep=keep), show)
