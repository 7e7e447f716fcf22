"""The command `profile`: where a layer's time goes, and what it makes the machine do."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nogemm.cli.bench import Rounds, Seconds, Seed, Threads, integers, words
from nogemm.cli.common import Json, clear_progress, finish, print_table, progress


def profile(
    method: Annotated[str, typer.Option(help="Kind of our layer.")] = "lookup",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One field of it.")] = None,
    d: Annotated[int, typer.Option("--d", help="Width of the model.")] = 384,
    hidden: Annotated[int, typer.Option(help="Hidden width of the dense layer; 0: 4 d.")] = 0,
    activation: Annotated[str, typer.Option(help="Of the dense layer.")] = "gelu",
    gated: Annotated[bool, typer.Option("--gated", help="A gated dense layer: gate, up and down.")] = False,
    dtype: Annotated[str, typer.Option(help="What ours is packed in: fp32, bf16 or int8.")] = "fp32",
    batch: Annotated[str, typer.Option(help="Tokens per call, with commas.")] = "1,64,4096",
    against: Annotated[str, typer.Option(help="Dense contenders, with commas.")] = "torch-fp32",
    counters: Annotated[str, typer.Option(help="Source of events: auto, perf, cachegrind or none.")] = "auto",
    counts: Annotated[str | None, typer.Option(help="Earlier result of the layer to take its events from.")] = None,
    project: Annotated[bool, typer.Option("--project", help="Fit a model, and project other machines.")] = False,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.1,
    checkpoint: Annotated[str | None, typer.Option(help="Distilled model to take a trained layer from.")] = None,
    site: Annotated[int, typer.Option(help="Which of its layers.")] = 0,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Say where a layer's time goes: phases, bandwidths, misses, energy, beside what the machine can do."""
    from nogemm.bench.layer import LayerBenchArgs
    from nogemm.bench.profile import ProfileArgs, run_profile
    from nogemm.bench.profile_tables import energy_table, profile_table, projection_table

    layer = LayerBenchArgs(
        method=method,
        set=tuple(set_ or ()),
        d=d,
        hidden=hidden,
        activation=activation,
        gated=gated,
        dtype=dtype,
        batch=integers("--batch", batch),
        against=words(against),
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        checkpoint=checkpoint,
        site=site,
        seed=seed,
    )
    args = ProfileArgs(layer=layer, counters=counters, counts=counts, project=project)
    result: dict[str, Any] = run_profile(args, note=progress)
    clear_progress()
    print(result["machine_line"])
    for table in (profile_table(result), energy_table(result), projection_table(result)):
        if table.rows:
            print(f"\n{table.title}")
            print_table(table.head, table.rows)
            print(table.hint)
    finish({"kind": "profile", **result}, json)
