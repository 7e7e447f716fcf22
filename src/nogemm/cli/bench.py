"""Commands that measure: layers, models and training steps beside dense peers, layers' decisions, papers' figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from nogemm.bench.report.tables import TextTable
from nogemm.cli.common import Json, checkout_has_papers, papers, print_partial, print_table, print_text_table
from nogemm.cli.options import (
    Activation,
    Against,
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
    integers,
    layer_args,
    refuse,
    refuse_without_checkpoint,
    words,
)
from nogemm.running.measured import Keep, Note, measured

app = typer.Typer(help="Time layers and models beside their dense peers.", no_args_is_help=True, rich_markup_mode=None)


@app.command("layer")
def layer(
    context: typer.Context,
    method: Method = "lookup",
    set_: Set = None,
    d: Width = 384,
    hidden: Hidden = 0,
    activation: Activation = "gelu",
    gated: Gated = False,
    dtype: Dtype = "fp32",
    path: Annotated[str, typer.Option(help="Of our layer of neurons: auto, rows or dense.")] = "auto",
    batch: Batch = "1,64,512,4096",
    against: Against = None,
    cache: Annotated[str, typer.Option(help="fresh, warm or both, with commas.")] = "fresh",
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.1,
    checkpoint: Checkpoint = None,
    site: Site = 0,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Time one layer of ours beside dense layers of the same shape."""
    refuse_without_checkpoint(context, checkpoint, "method", "set_")
    args = layer_args(locals())
    from nogemm.bench.layer import run_layer_bench
    from nogemm.bench.report.verdict import dense_faster, verdict

    def work(note: Note, keep: Keep) -> dict[str, Any]:
        result = run_layer_bench(args, note=note, keep=keep)
        return result | {"dense_faster": dense_faster(result["rows"])}

    def show(result: dict[str, Any]) -> None:
        print_rows(result, ("batch", "cache", "codes"), "us", 1.0)
        print(verdict(result["rows"]))

    measured("layer", json, work, show)


@app.command("model")
def model(
    context: typer.Context,
    dense: Annotated[
        str, typer.Option(help="Directory of the dense model; bert-base, roberta-base: random weights.")
    ] = "all-MiniLM-L6-v2",
    model: Annotated[str | None, typer.Option(help="Converted model [convert the dense one, random weights].")] = None,
    method: Annotated[str, typer.Option(help="Kind of our layers, without --model.")] = "lookup",
    set_: Set = None,
    dtype: Dtype = "fp32",
    shape: Annotated[str, typer.Option(help="TEXTSxTOKENS, with commas.")] = "1x16,1x128,32x128",
    against: Against = None,
    ceiling: Annotated[str | None, typer.Option(help="Engines that also run the model without its FFNs.")] = None,
    layers: Annotated[str, typer.Option(help="Run those engines with so many of its layers, too; with commas.")] = "",
    peer: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR", help="Run another model in them, too.")] = None,
    exported: Annotated[str | None, typer.Option(help="OpenVINO precisions that ours is exported to.")] = None,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.1,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Time a whole converted model beside the dense one."""
    if model is not None:
        refuse(context, ("method", "set_"), "does not go with --model, which is converted already")
    from nogemm.bench.model import ModelBenchArgs, parse_shape, run_model_bench

    chosen: dict[str, Any] = {
        name: words(text)
        for name, text in (("against", against), ("ceiling", ceiling), ("exported", exported))
        if text is not None
    }
    args = ModelBenchArgs(
        dense=dense,
        model=model,
        method=method,
        set=tuple(set_ or ()),
        dtype=dtype,
        shape=tuple(parse_shape(word) for word in words(shape)),
        layers=integers("--layers", layers),
        peer=tuple(peer or ()),
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        seed=seed,
        **chosen,
    )
    measured(
        "model",
        json,
        lambda note, keep: run_model_bench(args, note=note, keep=keep),
        lambda result: print_rows(result, ("batch", "length"), "ms", 1000.0),
    )


@app.command("methods")
def methods(
    d: Width = 512,
    hidden: Annotated[int, typer.Option(help="Hidden width of the dense layer.")] = 2048,
    activation: Activation = "gelu",
    method: Annotated[str | None, typer.Option(help="Kinds of layers, with commas [all].")] = None,
    dtype: Annotated[str, typer.Option(help="What ours are packed in: fp32, bf16 or int8.")] = "fp32",
    batch: Batch = "1,64,4096",
    against: Annotated[str, typer.Option(help="Dense contenders, with commas.")] = "torch-fp32,torch-int8",
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.1,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Compare one layer of every method: FLOP, bytes, parameters, time."""
    from nogemm.bench.methods import MethodsBenchArgs, run_methods_bench
    from nogemm.bench.report.tables import methods_table

    args = MethodsBenchArgs(
        d=d,
        hidden=hidden,
        activation=activation,
        methods=words(method or ""),
        dtype=dtype,
        batch=integers("--batch", batch),
        against=words(against),
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        seed=seed,
    )
    more = None
    if checkout_has_papers():
        from nogemm_papers.fff_gather import published_forms as more
    measured(
        "methods",
        json,
        lambda note, keep: run_methods_bench(args, more=more, note=note, keep=keep),
        lambda result: _print_table(result, methods_table),
    )


@app.command("projections")
def projections(
    d: Annotated[int, typer.Option("--d", help="Width, a power of two.")] = 512,
    matrices: Annotated[int, typer.Option(help="Gaussian matrices that exact fits are averaged over.")] = 5,
    evaluations: Annotated[int, typer.Option(help="Of the loss in each descent.")] = 150,
    restarts: Annotated[int, typer.Option(help="Descents per point.")] = 2,
    seed: Annotated[int, typer.Option(help="Of matrices and starts.")] = 0,
    json: Json = None,
) -> None:
    """Approximate Gaussian matrices by every projection: error against FLOP and parameters."""
    from nogemm.bench.report.tables import projections_table

    with papers("bench projections"):
        from nogemm_papers.projections import ProjectionBenchArgs, run_projection_bench

    args = ProjectionBenchArgs(d=d, matrices=matrices, evaluations=evaluations, restarts=restarts, seed=seed)
    measured(
        "projections",
        json,
        lambda note, keep: run_projection_bench(args, note=note, keep=keep),
        lambda result: _print_table(result, projections_table),
    )


@app.command("lsh")
def lsh(
    model: Annotated[str, typer.Option(help="Directory of a dense model.")] = "all-MiniLM-L6-v2",
    site: Annotated[int, typer.Option(help="Which of its FFNs.")] = 3,
    bits: Annotated[str, typer.Option(help="Bits per table, with commas.")] = "4,6,8",
    tables: Annotated[str, typer.Option(help="Tables of random hashes, with commas.")] = "1,2,4,8,16,32,64,128,256",
    learned_tables: Annotated[str, typer.Option(help="Tables of learned hashes, with commas.")] = "1,4,16,64",
    top: Annotated[str, typer.Option(help="How many strongest neurons are searched, with commas.")] = "1,16,77",
    tokens: Annotated[int, typer.Option(help="Tokens of the test split that search.")] = 2048,
    draws: Annotated[int, typer.Option(help="Of random hashes, averaged.")] = 3,
    steps: Annotated[int, typer.Option(help="Of training for each learned hash.")] = 100,
    seed: Annotated[int, typer.Option(help="Of hashes, training and the Gaussian layer.")] = 0,
    json: Json = None,
) -> None:
    """Count the strongest neurons that hashes and sketches find, and what finding them costs."""
    from nogemm.bench.report.tables import lsh_table

    with papers("bench lsh"):
        from nogemm_papers.lsh import LshBenchArgs, run_lsh_bench

    args = LshBenchArgs(
        model=model,
        site=site,
        bits=integers("--bits", bits),
        tables=integers("--tables", tables),
        learned_tables=integers("--learned-tables", learned_tables),
        top=integers("--top", top),
        tokens=tokens,
        draws=draws,
        steps=steps,
        seed=seed,
    )
    measured(
        "lsh",
        json,
        lambda note, keep: run_lsh_bench(args, note=note, keep=keep),
        lambda result: _print_table(result, lsh_table),
    )


@app.command("train-step")
def train_step(
    context: typer.Context,
    method: Annotated[str, typer.Option(help="Kind of our layer: lookup, tree or hire.")] = "lookup",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One field of it [as published].")
    ] = None,
    d: Width = 768,
    hidden: Annotated[int, typer.Option(help="Hidden width of the dense layer.")] = 3072,
    activation: Activation = "gelu",
    tokens: Annotated[int, typer.Option(help="Of a step.")] = 4096,
    codes: Annotated[str, typer.Option(help="uniform, skewed or both, with commas.")] = "uniform,skewed",
    threads: Threads = 0,
    rounds: Rounds = 7,
    checkpoint: Checkpoint = None,
    site: Site = 0,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Time one training step of a layer: forward, backward, update."""
    refuse_without_checkpoint(context, checkpoint, "set_", "codes")
    from nogemm.bench.report.tables import train_step_table
    from nogemm.bench.train_step import TrainStepArgs, run_train_step

    args = TrainStepArgs(
        method=method,
        set=None if set_ is None else tuple(set_),
        d=d,
        hidden=hidden,
        activation=activation,
        tokens=tokens,
        codes=words(codes),
        threads=threads,
        rounds=rounds,
        checkpoint=checkpoint,
        site=site,
        seed=seed,
    )
    measured(
        "train-step",
        json,
        lambda note, keep: run_train_step(args, note=note, keep=keep),
        lambda result: _print_table(result, train_step_table),
    )


@app.command("recall")
def recall(
    checkpoint: Annotated[str, typer.Option(help="Directory of a model with HireFFN layers.")],
    tokens: Annotated[int, typer.Option(help="Of the packaged sample that every layer sees.")] = 2048,
    json: Json = None,
) -> None:
    """Count the strongest neurons that the sketches of a model's HireFFN layers find."""
    from nogemm.bench.hire_recall import measure_checkpoint
    from nogemm.bench.report.tables import hire_recall_table

    measured(
        "hire-recall",
        json,
        lambda note, keep: measure_checkpoint(checkpoint, tokens, note=note, keep=keep),
        lambda result: _print_table(result, hire_recall_table),
    )


@app.command("head")
def head(
    model: Annotated[str, typer.Option(help="A decoder: directory, hub name or GGUF file.")],
    data: Annotated[str, typer.Option(help="Texts whose tokens are measured: a file, or `sample`.")] = "sample",
    dtype: Annotated[str, typer.Option(help="Of the head's weights: bf16 or fp32.")] = "bf16",
    leading: Annotated[int, typer.Option(help="Coordinates with eight bits.")] = 32,
    sketch: Annotated[int, typer.Option(help="Coordinates that a search reads.")] = 128,
    rows: Annotated[int | None, typer.Option(help="Rows that a search computes exactly [by the vocabulary].")] = None,
    positions: Annotated[int, typer.Option(help="States that are verified and timed.")] = 2000,
    batch: Batch = "1",
    against: Annotated[str | None, typer.Option(help="Dense engines, with commas [a choice of all].")] = None,
    threads: Threads = 0,
    rounds: Rounds = 7,
    seconds: Seconds = 0.3,
    json: Json = None,
) -> None:
    """Time a vocabulary head that names its most likely token beside dense heads."""
    from nogemm.bench.head import AGAINST, HeadArgs, run_head_bench
    from nogemm.bench.report.tables import head_table
    from nogemm.train.sources import texts

    args = HeadArgs(
        model=model,
        dtype=dtype,
        leading=leading,
        sketch=sketch,
        rows=rows,
        positions=positions,
        batch=integers("--batch", batch),
        against=AGAINST if against is None else words(against),
        threads=threads,
        rounds=rounds,
        seconds=seconds,
    )
    measured(
        "head",
        json,
        lambda note, keep: run_head_bench(args, texts(data), note=note, keep=keep),
        lambda result: _print_table(result, head_table),
    )


@app.command("flips")
def flips(
    tokens: Annotated[int, typer.Option(help="Random tokens that each layer gets.")] = 4096,
    batch: Batch = "1,4096",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Count code bits and turns of trees that packed layers decide otherwise than float64."""
    from nogemm.bench.flips import run_flips_bench
    from nogemm.bench.report.tables import flips_table

    batches = integers("--batch", batch)
    measured(
        "flips",
        json,
        lambda note, keep: run_flips_bench(tokens=tokens, batches=batches, seed=seed, note=note, keep=keep),
        lambda result: _print_table(result, flips_table),
    )


def _print_table(result: dict[str, Any], make: Callable[[dict[str, Any]], TextTable]) -> None:
    print(result["machine_line"])
    print_text_table(make(result))
    print_partial(result)


def print_rows(result: dict[str, Any], keys: Sequence[str], unit: str, scale: float) -> None:
    """Print a result's rows: a contender's case, median and spread of its times, and what was checked."""
    from nogemm.bench.engine.result import shown_name, why_not

    print(result["machine_line"])
    head = ["contender", *keys, f"median {unit}", "p10", "p90", "ratio", "max error"]
    agrees = any("agreement" in row for row in result["rows"])
    head += ["agreement"] if agrees else []
    flips = any("flip_rate" in row for row in result["rows"])
    head += ["flip rate"] if flips else []
    rows = []
    for row in result["rows"]:
        start = [shown_name(row), *(str(row[key]) for key in keys)]
        if row.get("us_median") is None:
            why = why_not(row) or "not run"
            rows.append([*start, why, *[""] * (len(head) - len(start) - 1)])
            continue
        times = [f"{row[name] / scale:.4g}" for name in ("us_median", "us_p10", "us_p90")]
        ratio = "" if row.get("ratio") is None else f"{row['ratio']:.2f}"
        error = "" if row.get("max_error") is None else f"{row['max_error']:.1e}"
        agreement = [f"{row['agreement']:.4f}" if "agreement" in row else ""] if agrees else []
        flipped = ["" if row.get("flip_rate") is None else f"{row['flip_rate']:.1e}"] if flips else []
        rows.append([*start, *times, ratio, error, *agreement, *flipped])
    print_table(head, rows)
    if any(row.get("native") is False for row in result["rows"]):
        print("not native: PyTorch operators stood in for the compiled kernel, so these are not the kernel's times")
    print_partial(result)
