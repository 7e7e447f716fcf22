"""The command `profile`: where a layer's time goes, and what it makes the machine do."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, checkout_has_papers, papers, print_partial, print_text_table
from nogemm.cli.options import (
    Activation,
    Batch,
    Checkpoint,
    Dtype,
    Gated,
    Hidden,
    Method,
    Rounds,
    Seconds,
    Seed,
    Set,
    Site,
    Threads,
    Width,
    layer_args,
)
from nogemm.running.measured import measured


def profile(
    method: Method = "lookup",
    set_: Set = None,
    d: Width = 384,
    hidden: Hidden = 0,
    activation: Activation = "gelu",
    gated: Gated = False,
    dtype: Dtype = "fp32",
    batch: Batch = "1,64,4096",
    against: Annotated[str, typer.Option(help="Dense contenders, with commas.")] = "torch-fp32",
    counters: Annotated[str, typer.Option(help="Source of events: auto, perf, cachegrind or none.")] = "auto",
    counts: Annotated[str | None, typer.Option(help="Earlier result of the layer to take its events from.")] = None,
    project: Annotated[bool, typer.Option("--project", help="Fit a model, and project other machines.")] = False,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.1,
    checkpoint: Checkpoint = None,
    site: Site = 0,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Say where a layer's time goes: phases, bandwidths, misses, energy, beside what the machine can do."""
    layer = layer_args(locals())
    from nogemm.bench.profile.profile import ProfileArgs, run_profile
    from nogemm.bench.profile.tables import energy_table, profile_table, projection_table

    args = ProfileArgs(layer=layer, counters=counters, counts=counts, project=project)
    figures = None
    if project or checkout_has_papers():
        with papers("profile --project"):
            from nogemm_papers.projected import FIGURES as figures

    def show(result: dict[str, Any]) -> None:
        print(result["machine_line"])
        for table in (profile_table(result), energy_table(result), projection_table(result)):
            if table.rows:
                print(f"\n{table.title}")
                print_text_table(table)
        print_partial(result)

    measured("profile", json, lambda note, keep: run_profile(args, figures=figures, note=note, keep=keep), show)
