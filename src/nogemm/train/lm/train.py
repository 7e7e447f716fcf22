"""Train a masked or a causal language model whose FFNs are any of ours, from scratch or from a checkpoint.

Reading order: `train_model`, `_prepared`, `_trained`; the loop is in `trainer.py`, counters and checkpoints in
`run.py`, data in `corpus.py` and `contexts.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from nogemm.convert import converted
from nogemm.convert.head import convert_head
from nogemm.errors import ConfigError
from nogemm.models.loading import load_tokenizer
from nogemm.train.guards import gradients_for, interrupts, sparse_rows
from nogemm.train.lm.corpus import Corpus, Source, open_corpus
from nogemm.train.lm.models import flops_per_token, make_model
from nogemm.train.lm.options import OF_NEW_MODELS, TrainOptions, preset_record, train_options
from nogemm.train.lm.report import Trained, TrainReport, perplexity
from nogemm.train.lm.run import Run
from nogemm.train.loop.session import (
    check_packages,
    check_shares,
    drive,
    open_in_turn,
    parameter_counts,
    run_counts,
    session,
    source_name,
)
from nogemm.train.loop.updates import make_groups


def train_model(
    data: Source = "sample",
    *,
    model: nn.Module | str | Path | None = None,
    tokenizer: Any = None,
    validation: Source | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    bar: bool | None = None,
    preset: str | None = None,
    options: TrainOptions | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> Trained:
    """Train a language model on text, its FFNs replaced by any of our layers.

        loss = mean over the guessed tokens of -log softmax(logits)[token] + what layers add while they train

    Guessed are 15 % of the tokens of a masked language model, the next token of a causal one. transformers' Trainer and
    accelerate run the loop: started by `torchrun` or `accelerate launch`, the processes share every batch, and their
    number changes the result by rounding only.

    Args:
        data: "sample", a text, JSONL or CSV file (also .gz), OWNER/NAME of a data set of the hub, which is streamed, a
            `datasets` dataset, or a list of texts.
        model: a transformers model with a vocabulary head, the directory or cached name of a checkpoint, or a JSON file
            of a config; None: a new model of `options.arch`.
        tokenizer: transformers'; None: that of the checkpoint, else one that is trained on the data.
        validation: texts to measure on; by default the sample's own split, or texts held out of the data by their hash.
        output_dir: where tokens, tokenizer, log and checkpoints go; without it nothing can be resumed.
        resume: continue from the last checkpoint in `output_dir`, if there is one. A finished run does nothing more and
            gives its report again.
        device: "cpu" or "cuda"; None: a GPU where there is one.
        bar: show a progress bar; by default on a terminal.
        preset: a set of defaults, "lookupffn", "hire" or "laptop"; see `train_options`.
        options, changes: `TrainOptions`, or single fields of it as keywords.
        trust_remote_code: run code that the checkpoint's directory brings.
    Returns:
        Trained(model, tokenizer, report): the model in evaluation mode, on the device it was trained on.
    Raises:
        ConfigError: options or model do not fit together. DataError: no text, too little of it, or data that changed
            since the run that is resumed.
        TrainingError: a loss or gradient is not finite (the last checkpoint stays), a directory in use or with an
            earlier run, or no room for a checkpoint.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state was saved, and the message says how to resume.
    Example:
        >>> found = nogemm.train_model("sample", preset="laptop", ffn=nogemm.LookupConfig(tables=32))  # doctest: +SKIP
    """
    start = time.monotonic()
    options = _chosen(options, preset, changes, model)
    check_packages(options, "train")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_shares(options, world, device, "train")
    with session(output_dir, "train") as (directory, first):
        run = Run(options, directory, start, keep=output_dir is not None, first=first)
        found, corpus = _prepared(run, data, model, tokenizer, validation, resume, device, world, trust_remote_code)
        facts = _facts(found, corpus, run, data, model) | {"preset": preset_record(preset, options)}
        with gradients_for(make_groups(found, options), found):
            return _trained(run, found, corpus, facts, bar, device, world)


def _chosen(options: TrainOptions | None, preset: str | None, changes: Mapping[str, Any], model: Any) -> TrainOptions:
    """Return the options that count, or say what does not go together."""
    if options is not None and (preset is not None or changes):
        raise ConfigError("train: give options, or a preset and single options, not both")
    given = [name for name in OF_NEW_MODELS if name in changes]
    if model is not None and given:
        raise ConfigError(f"train: {', '.join(given)} describe a new model, and a model was given")
    return options or train_options(preset, **changes)


def _prepared(
    run: Run,
    data: Source,
    model: Any,
    tokenizer: Any,
    validation: Source | None,
    resume: bool,
    device: str | None,
    world: int,
    trust_remote_code: bool,
) -> tuple[Any, Corpus]:
    """Return model and corpus; the first process tokenises, the others open what it wrote."""
    from nogemm.train.loop.trainer import start_processes

    start_processes(device, world)
    if tokenizer is None:
        # A module says where it was loaded from; one that was made says "", and gets a tokenizer of the data.
        name = getattr(model.config, "_name_or_path", "") if isinstance(model, nn.Module) else model or ""
        if name and Path(name).suffix != ".json":
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)

    def read(resume: bool) -> Corpus:
        return open_corpus(run.options, run.directory, data, validation, tokenizer, resume)

    corpus = open_in_turn(run, read, resume, world)
    found = make_model(run.options, model, corpus.tokenizer, trust_remote_code=trust_remote_code)
    run.restore(found)
    return found, corpus


def _trained(
    run: Run, model: Any, corpus: Corpus, facts: dict[str, Any], bar: bool | None, device: str | None, world: int
) -> Trained:
    """Run what is left of the training, measure, and report."""
    from nogemm.train.lm.trainer import LanguageTrainer
    from nogemm.train.loop.trainer import arguments_for

    options = run.options
    cached = getattr(model.config, "use_cache", None)
    if run.finished is None:
        lazy = options.optimizer == "lazy-adam"
        with sparse_rows(model, lazy), interrupts() as stop:
            run.stop = stop
            trainer = LanguageTrainer(model, arguments_for(run, device, world), run, corpus)
            drive(run, trainer, bar)
            loss = run.measure(trainer)["validation_loss"]
            run.journal.row(run.step, run.tokens, run.seconds(), 0.0, {"validation_loss": loss})
            run.finished = {
                "validation_loss": loss, "loss": run.journal.state()["last"], "seconds": run.seconds(),
                "busy": run.busy, "processes": world, "device": trainer.args.device.type,
            }  # fmt: skip
            run.save(model, trainer.inner_optimiser, run.finished)
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            if world > 1:
                dist.barrier()
    if cached is not None:
        model.config.use_cache = cached
    model.eval()
    if options.head == "hire":
        rows = corpus.validation.rows(np.arange(min(corpus.validation.count, 64)))
        convert_head(model, data=[{"input_ids": torch.from_numpy(rows).to(model.device)}])
    return Trained(model, corpus.tokenizer, _report(run, run.finished, corpus, facts))


def _facts(model: Any, corpus: Corpus, run: Run, data: Source, source: Any) -> dict[str, Any]:
    """Return what is known of a run before it begins."""
    options = run.options
    module = isinstance(source, nn.Module)
    kind = "new" if source is None else "module" if module else "config" if Path(source).is_file() else "checkpoint"
    return {
        "parameters": parameter_counts(model),
        "flops_per_token": flops_per_token(model, options.context, corpus.guessing.guessed(options.context)),
        "model": {
            "architecture": type(model).__name__,
            "from": kind,
            "ffn": {name: layer.config.to_dict() for name, layer in converted(model).items()},
        },
        "data": {
            "source": source_name(data),
            "documents": corpus.documents,
            "tokens": len(corpus.train.file.tokens),
            "validation_tokens": corpus.validation.count * options.context,
            "vocabulary": len(corpus.tokenizer),
        },
    }


def _report(run: Run, finished: dict[str, Any], corpus: Corpus, facts: dict[str, Any]) -> TrainReport:
    options, new = run.options, facts["model"]["from"] == "new"
    return TrainReport(
        validation_loss=finished["validation_loss"],
        perplexity=perplexity(finished["validation_loss"]),
        epochs=run.step * options.batch / corpus.train.count,
        options={name: value for name, value in options.to_dict().items() if new or name not in OF_NEW_MODELS},
        **run_counts(run, finished),
        **facts,
    )
