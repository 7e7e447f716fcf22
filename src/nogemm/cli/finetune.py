"""The command `finetune`: a model for labels, pairs, numbers or embeddings, its FFNs converted or dense."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nogemm.cli.common import Json, Trust, finish
from nogemm.cli.train import carry_out, choices_of
from nogemm.train.task.options import FinetuneOptions, finetune_options
from nogemm.train.task.report import Finetuned, FinetuneReport


def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or cached name, converted or dense.")],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="Directory to write the model to.")],
    data: Annotated[
        str, typer.Option(help="JSONL or CSV file (also .gz), glue/TASK, or OWNER/NAME of a hub's data set.")
    ],
    validation: Annotated[
        str | None, typer.Option(help="Rows that choose the best state [the data's own split, or held out of it].")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Rows that it is tested on, once [the data's own split].")] = None,
    task: Annotated[str | None, typer.Option(help="classify, pairs, regress or embed [classify].")] = None,
    text: Annotated[str | None, typer.Option(help="Field of the text [text].")] = None,
    text2: Annotated[str | None, typer.Option(help="Field of the second text [text2].")] = None,
    label: Annotated[str | None, typer.Option(help="Field of the label or the number [label].")] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="Chooses the best state: accuracy, macro_f1, matthews; pearson, spearman; mrr_at_10."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Budget in passes over the data [3, without any other].")] = None,
    tokens: Annotated[int | None, typer.Option(help="Budget in tokens.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget in updates.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Budget in seconds.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of an update, of all processes together.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a text, or of a pair's two.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, or lazy-adam for trees.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Any other choice; may be repeated.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [a GPU where there is one].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of a new head, the rows' order and dropout.")] = None,
    run: Annotated[Path | None, typer.Option(help="Directory of checkpoints [OUTPUT with `-run` added].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint of the run.")] = False,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Fine-tune MODEL on labelled data and write it to OUTPUT; torchrun and accelerate launch start it as well."""
    import nogemm

    options = finetune_options(**choices_of(FinetuneOptions, locals(), option))
    folder = run or output.with_name(output.name + "-run")

    def start() -> Finetuned:
        return nogemm.finetune(
            model,
            data,
            validation=validation,
            test=test,
            output_dir=folder,
            resume=resume,
            device=device,
            options=options,
            trust_remote_code=trust_remote_code,
        )

    found = carry_out(start, {"kind": "finetune", "options": options.to_dict()}, output, folder, json)
    if found is not None:
        print(summary(found.report))
        print(output)
        finish(found.report.to_dict(), json)


def summary(report: FinetuneReport) -> str:
    """Say in a few lines what a run came to."""
    name = report.metric
    lines = [
        f"{report.tokens:,} tokens in {report.seconds:.0f} s ({report.tokens_per_second:,.0f} tokens/s), best "
        f"{name} on {report.data['rows']['validation']:,} validation rows {report.best['value']:.4f} "
        f"(step {report.best['step']:.0f} of {report.steps})"
    ]
    for key, figure in (report.test or {}).items():
        interval = f"{figure['low']:.4f} to {figure['high']:.4f}, {figure['samples']:,} rows"
        lines.append(f"test {key} {figure['value']:.4f} ({interval})")
    return "\n".join(lines)
