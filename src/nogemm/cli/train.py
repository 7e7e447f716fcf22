"""The command `train`: a language model from text, its FFNs any of ours."""

from __future__ import annotations

import dataclasses
import json as json_format
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from nogemm.cli.common import Json, Trust, finish, print_partial
from nogemm.cli.models import parse_choice
from nogemm.cli.options import Set, refuse
from nogemm.config import Config, LayerConfig, layer_kinds, parse_layer
from nogemm.errors import CheckpointError, NogemmError
from nogemm.running.measured import end_early
from nogemm.running.partial import Record
from nogemm.running.progress import progress, training_lines
from nogemm.train.lm.options import PRESETS, TrainOptions, train_options
from nogemm.train.lm.report import Trained, TrainReport
from nogemm.train.task.report import Finetuned

Found = TypeVar("Found", Trained, Finetuned)


def train(
    starting: typer.Context,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to write the model to.")],
    data: Annotated[
        str, typer.Option(help="Text, JSONL or CSV file (also .gz), OWNER/NAME of a hub's data set, or `sample`.")
    ] = "sample",
    model: Annotated[
        str | None, typer.Option(help="Checkpoint to go on from, or JSON file of a config [a new model].")
    ] = None,
    preset: Annotated[str | None, typer.Option(help=f"Set of defaults: {', '.join(PRESETS)}.")] = None,
    task: Annotated[str | None, typer.Option(help="mlm or clm.")] = None,
    arch: Annotated[str | None, typer.Option(help="Of a new model: roberta, llama, ...")] = None,
    layers: Annotated[int | None, typer.Option(help="Of a new model.")] = None,
    width: Annotated[int | None, typer.Option("--width", "--d", help="Of a new model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of a new model's attention.")] = None,
    hidden: Annotated[int | None, typer.Option(help="Neurons of its dense FFNs.")] = None,
    method: Annotated[
        str | None, typer.Option(help=f"Kind of layer that replaces them: {', '.join(layer_kinds())}.")
    ] = None,
    set_: Set = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Directory or cached name [the checkpoint's, or one trained on the data].")
    ] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Tokens of a tokenizer that is trained.")] = None,
    field: Annotated[str | None, typer.Option(help="Field of JSONL or CSV rows that holds the text.")] = None,
    validation: Annotated[str | None, typer.Option(help="Texts to measure on [held out of the data].")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in updates.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Budget in seconds.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens seen at once.")] = None,
    batch: Annotated[int | None, typer.Option(help="Contexts of an update, of all processes together.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, or lazy-adam for trees.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Any other choice; may be repeated.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [a GPU where there is one].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data and masks.")] = None,
    run: Annotated[Path | None, typer.Option(help="Directory of checkpoints [OUTPUT with `-run` added].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint of the run.")] = False,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Train a language model on text and write it to OUTPUT; torchrun and accelerate launch start it as well."""
    import nogemm
    from nogemm.models.loading import load_tokenizer

    _refuse_vocabulary(starting, model, tokenizer)
    choices = choices_of(TrainOptions, locals(), option)
    if method is not None or set_:
        choices["ffn"] = layer_of(method, set_ or [], preset)
    options = train_options(preset, **choices)
    folder = run or output.with_name(output.name + "-run")

    def start() -> Trained:
        return nogemm.train_model(
            data,
            model=model,
            tokenizer=None if tokenizer is None else load_tokenizer(tokenizer, trust_remote_code=trust_remote_code),
            validation=validation,
            output_dir=folder,
            resume=resume,
            device=device,
            preset=preset,
            trust_remote_code=trust_remote_code,
            **choices,
        )

    found = carry_out(start, {"kind": "train", "options": options.to_dict()}, output, folder, json)
    if found is not None:
        print(summary(found.report))
        print(output)
        finish(found.report.to_dict(), json)


def choices_of(cls: type, known: Mapping[str, Any], option: Sequence[str] | None) -> dict[str, Any]:
    """Return what a command was told of the fields of its options, by its own parameters and by --option."""
    given = {field.name: known[field.name] for field in dataclasses.fields(cls) if field.name in known}
    choices = {name: value for name, value in given.items() if value is not None}
    return choices | dict(parse_choice(word, "--option") for word in option or [])


def carry_out(
    start: Callable[[], Found], begun: dict[str, Any], output: Path, run: Path, json: Path | None
) -> Found | None:
    """Train and save the model; None in processes that are not the first. `begun` is kept where the run is stopped."""
    first = int(os.environ.get("RANK", "0")) == 0
    record = Record(json if first else None)
    try:
        with progress.watching(), training_lines():
            found = start()
    except KeyboardInterrupt as stopped:
        record.keep(begun)
        end_early(record, stopped, print_partial)
    if not first:
        return None
    save(found, output, run)
    return found


def _refuse_vocabulary(context: typer.Context, model: str | None, tokenizer: str | None) -> None:
    """Refuse the size of a tokenizer where none is trained."""
    if tokenizer is not None or (model is not None and Path(model).suffix != ".json"):
        own = "--tokenizer" if tokenizer is not None else "--model, a checkpoint that has a tokenizer"
        refuse(context, ["vocabulary"], f"does not go with {own}: no tokenizer is trained")


def summary(report: TrainReport) -> str:
    """Say in a line what a run came to."""
    return (
        f"{report.tokens:,} tokens in {report.seconds:.0f} s ({report.tokens_per_second:,.0f} tokens/s), "
        f"validation loss {report.validation_loss:.4f}, perplexity {report.perplexity:.2f}"
    )


def save(found: Trained | Finetuned, output: Path, run: Path) -> None:
    """Write the trained model; where it cannot be, say how it is saved without training anew."""
    import nogemm

    try:
        nogemm.save(found.model, output, tokenizer=found.tokenizer)
    except (NogemmError, OSError) as error:
        raise CheckpointError(
            f"{error}. The trained weights are in {run}: the same command with --resume, --run {run} and another "
            "OUTPUT saves them there, and trains nothing anew"
        ) from error


def layer_of(method: str | None, assignments: list[str], preset: str | None) -> LayerConfig:
    """Make the config of --method and --set; without --method they change the preset's layer, or LookupFFN."""
    base = None if method is not None or preset is None else PRESETS.get(preset, {}).get("ffn")
    kind = method or (base.kind if base is not None else "lookup")
    return parse_layer(kind, [*(words_of(base) if base is not None else []), *assignments])


def words_of(config: LayerConfig) -> list[str]:
    """Return the words for --set that say how a config differs from its kind's defaults."""
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config)]
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    return [f"{name}={json_format.dumps(value)}" for name, value in changed.items() if not isinstance(value, Config)]
