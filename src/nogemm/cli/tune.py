"""The command `tune`: the model that meets a budget, found among fewer layers, other FFNs, token tables and engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nogemm.cli.common import Json, finish, print_partial, print_text_table
from nogemm.cli.models import Data, ModelArgument, OutputArgument, parse_choice
from nogemm.cli.options import words
from nogemm.errors import CheckpointError, NogemmError
from nogemm.running.measured import end_early
from nogemm.running.partial import Record
from nogemm.running.progress import progress, training_lines


def tune(
    model: ModelArgument,
    output: OutputArgument,
    data: Data = "sample",
    quality: Annotated[float | None, typer.Option(help="Budget: least agreement with MODEL; the fastest wins.")] = None,
    latency: Annotated[float | None, typer.Option(help="Budget: most milliseconds of a call; the best wins.")] = None,
    memory: Annotated[float | None, typer.Option(help="Budget: most MB of stored weights; the best wins.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="That runs the result, such as openvino-int8 [the fastest for MODEL].")
    ] = None,
    shape: Annotated[str, typer.Option(help="Of the call that is timed: TEXTSxTOKENS.")] = "1x128",
    offers: Annotated[str | None, typer.Option(help="What may stand in an FFN's place, with commas [all].")] = None,
    tokens: Annotated[int | None, typer.Option(help="Of a full distillation [what the time allows].")] = None,
    max_seconds: Annotated[float, typer.Option(help="Budget of time, of all sessions together.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Of the order of the data.")] = 0,
    run: Annotated[Path | None, typer.Option(help="Directory of what is found [OUTPUT with `-run` added].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind the last result of the run.")] = False,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Any other choice; may be repeated.")
    ] = None,
    json: Json = None,
) -> None:
    """Search the cheapest model that is good enough, made of the encoder MODEL, and write it to OUTPUT."""
    import nogemm
    from nogemm.bench.model import parse_shape
    from nogemm.convert.save import save_like

    choices: dict[str, Any] = {"quality": quality, "latency_ms": latency, "memory_mb": memory, "engine": engine}
    choices |= {"tokens": tokens, "max_seconds": max_seconds, "seed": seed, "shape": parse_shape(shape)}
    choices |= {"offers": None if offers is None else words(offers)}
    choices = {name: value for name, value in choices.items() if value is not None}
    choices |= dict(parse_choice(word, "--option") for word in option or [])
    options = nogemm.tune_options(**choices)
    run = run or output.with_name(output.name + "-run")
    record = Record(json, "tune")
    try:
        with progress.watching(), training_lines():
            found = nogemm.tune(
                model, data, output_dir=run, resume=resume, options=options, note=progress, keep=record.keep
            )
    except KeyboardInterrupt as stop:
        record.keep({"options": options.to_dict(), "run": str(run)} | (record.result or {}))
        end_early(record, stop, print_partial)
    try:
        save_like(found.model, model, output, found.tokenizer)
    except (NogemmError, OSError) as error:
        raise CheckpointError(
            f"{error}. The search is in {run}: the same command with --resume, --run {run} and another OUTPUT saves "
            "the model there, and searches nothing anew"
        ) from error
    _show(found.report.to_dict())
    print(output)
    finish(found.report.to_dict(), json)


def _show(result: dict[str, Any]) -> None:
    """Print the front with every rival, and the outcome."""
    from nogemm.bench.report.tune import tune_table

    print(result["machine_line"])
    print_text_table(tune_table(result))
    for line in result["notes"]:
        print(f"note: {line}")
    print(result["verdict"])
