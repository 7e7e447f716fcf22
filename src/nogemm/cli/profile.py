"""The command `profile`: where a layer's time goes; with `--sparsity`, which FFNs of a model are sparse."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, Trust, checkout_has_papers, papers, print_partial, print_text_table
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
    refuse,
    refuse_without_checkpoint,
    words,
)
from nogemm.errors import ConfigError
from nogemm.running.measured import measured

# What each of the two modes takes; the rest belongs to both.
_OF_LAYER = ("method", "set_", "d", "hidden", "activation", "gated", "batch", "against", "counters", "counts")
_OF_LAYER += ("project", "checkpoint", "site")
_OF_MODEL = ("data", "keep", "tokens", "layerwise", "trust_remote_code")


def profile(
    context: typer.Context,
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
    sparsity: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure instead how sparse the FFNs of this model are.")
    ] = None,
    data: Annotated[str, typer.Option(help="Of --sparsity: a file of texts, or `sample`.")] = "sample",
    keep: Annotated[str, typer.Option(help="Of --sparsity: shares of the neurons, with commas.")] = "0.05,0.1,0.25,0.5",
    tokens: Annotated[int, typer.Option(help="Of --sparsity: tokens of the data.")] = 2048,
    layerwise: Annotated[
        bool, typer.Option("--layerwise", help="Of --sparsity: also judge the model with one FFN cut at a time.")
    ] = False,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Say where a layer's time goes: phases, bandwidths, misses, energy, beside what the machine can do.

    With --sparsity: which FFNs of a model are sparse, what sketches find, what that would save, and what it costs.
    """
    if sparsity is None:
        refuse(context, _OF_MODEL, "needs --sparsity")
        refuse_without_checkpoint(context, checkpoint, "method", "set_")
    else:
        refuse(context, _OF_LAYER, "does not go with --sparsity")
        chosen = {"dtype": dtype, "threads": threads, "rounds": rounds, "seconds": seconds, "seed": seed}
        chosen |= {"keep": _shares(keep), "tokens": tokens, "layerwise": layerwise}
        _sparsity(sparsity, data, chosen, trust_remote_code, json)
        return
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


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in words(text))
    except ValueError:
        raise ConfigError(f"--keep: expected shares such as 0.05,0.1, got {text!r}") from None


def _sparsity(model: str, data: str, chosen: dict[str, Any], trust: bool, json: Any) -> None:
    from nogemm.bench.sparsity.profile import SparsityOptions, run_sparsity
    from nogemm.bench.sparsity.tables import sparsity_tables

    options = SparsityOptions(**chosen)

    def show(result: dict[str, Any]) -> None:
        print(result["machine_line"])
        for table in sparsity_tables(result):
            print(f"\n{table.title}")
            print_text_table(table)
        print_partial(result)

    measured(
        "sparsity",
        json,
        lambda note, keep: run_sparsity(model, data, options, trust_remote_code=trust, note=note, keep=keep),
        show,
    )
