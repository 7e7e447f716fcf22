"""Fine-tune a transformers model, converted or dense, on labelled texts, pairs, numbers, or texts that belong together.

Reading order: `finetune`, `_prepared`, `_trained`; rows are read in `data.py`, dealt in `corpus.py`, measured in
`metrics.py`; counters, checkpoints and the best state are in `run.py`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from nogemm.convert import converted
from nogemm.errors import ConfigError
from nogemm.train.guards import gradients_for, interrupts, sparse_rows
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
from nogemm.train.task.corpus import Corpus, numbered, open_corpus
from nogemm.train.task.data import Examples, Labels, counted, read_data
from nogemm.train.task.metrics import figures
from nogemm.train.task.models import Prepared, make_groups, prepare
from nogemm.train.task.options import METRICS, FinetuneOptions, finetune_options
from nogemm.train.task.report import Finetuned, FinetuneReport
from nogemm.train.task.run import FinetuneRun

CALLER = "finetune"


def finetune(
    model: nn.Module | str | Path,
    data: Any,
    *,
    validation: Any = None,
    test: Any = None,
    tokenizer: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    bar: bool | None = None,
    options: FinetuneOptions | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> Finetuned:
    """Fine-tune a model on labelled texts, on pairs, on numbers, or for embeddings; its FFNs stay what they are.

        classify, pairs   loss = mean over rows of -log softmax(logits)[label]
        regress           loss = mean over rows of (answer - number)^2 / variance of the numbers
        embed             loss = mean over pairs of -log softmax_j(cos(a_i, b_j) / temperature)[i]

    The state that is best on the validation rows is kept, and measured once on the test rows. A base model gets the
    classification head that transformers gives it. transformers' Trainer and accelerate run the loop, for "embed"
    sentence-transformers' trainer; started by `torchrun` or `accelerate launch`, the processes share every batch, and
    their number changes the result by rounding only.

    Args:
        model: the directory or cached name of a checkpoint, converted or dense; a transformers model with a
            classification head; for "embed" a directory, a name or a SentenceTransformer. A module is trained in place.
        data: a JSONL or CSV file (also .gz), a list of mappings, a `datasets` data set or several splits of one,
            "glue/sst2" and the other tasks of GLUE, or OWNER/NAME[:CONFIG] of the hub. Rows may name their split.
        validation, test: other rows, in any of these forms; by default the data's own splits, and for validation rows
            held out of the data by the hash of their texts.
        tokenizer: transformers'; None: the checkpoint's.
        output_dir: where tokens, log and checkpoints go; without it nothing can be resumed.
        resume: continue from the last checkpoint in `output_dir`, if there is one. A finished run does nothing more and
            gives its report again.
        device: "cpu" or "cuda"; None: a GPU where there is one.
        bar: show a progress bar; by default on a terminal.
        options, changes: `FinetuneOptions`, or single fields of it as keywords.
        trust_remote_code: run code that the checkpoint's directory brings.
    Returns:
        Finetuned(model, tokenizer, report): the best state, in evaluation mode, on the device it was trained on.
    Raises:
        ConfigError: options, model and data do not fit together. DataError: rows that cannot be read, too few of them,
            labels that do not fit, or data that changed since the run that is resumed.
        TrainingError: a loss or gradient is not finite (the last checkpoint stays), a directory in use or with an
            earlier run, or no room for a checkpoint.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state was saved, and the message says how to resume.
    Example:
        >>> found = nogemm.finetune("converted", "reviews.csv", text="text", label="label")  # doctest: +SKIP
    """
    start = time.monotonic()
    if options is not None and changes:
        raise ConfigError("finetune: give options or single options, not both")
    options = options or finetune_options(**changes)
    embeds = options.task == "embed"
    check_packages(options, CALLER, "sklearn", "scipy", *(["sentence_transformers", "datasets"] if embeds else []))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if embeds and world > 1 and options.micro_batch is not None:
        raise ConfigError('finetune: task="embed" takes no micro_batch where several processes share a batch')
    check_shares(dataclasses.replace(options, micro_batch=None) if embeds else options, world, device, CALLER)
    with session(output_dir, CALLER) as (directory, first):
        run = FinetuneRun(options, directory, start, keep=output_dir is not None, first=first)
        sources = {"train": data, "validation": validation, "test": test}
        found, examples = _prepared(run, sources, model, tokenizer, resume, device, world, trust_remote_code)
        facts = _facts(found, run, examples, data, model)
        with gradients_for(make_groups(found.model, options), found.model):
            return _trained(run, found, facts, bar, device, world)


def _prepared(
    run: FinetuneRun,
    sources: dict[str, Any],
    model: Any,
    tokenizer: Any,
    resume: bool,
    device: str | None,
    world: int,
    trust_remote_code: bool,
) -> tuple[Prepared, dict[str, Examples]]:
    """Read rows and model; the first process tokenises, the others open what it wrote."""
    from nogemm.train.loop.trainer import start_processes

    start_processes(device, world)
    options = run.options

    def read(resume: bool) -> tuple[Prepared, dict[str, Examples], Corpus]:
        examples = read_data(options, sources["train"], sources["validation"], sources["test"])
        found = prepare(options, model, tokenizer, examples, trust_remote_code=trust_remote_code)
        targets = {part: _targets(rows, found.labels, options) for part, rows in examples.items()}
        corpus = open_corpus(
            options, run.directory, examples, targets, found.tokenizer, found.max_length, resume=resume
        )  # fmt: skip
        return found, examples, corpus

    found, examples, run.corpus = open_in_turn(run, read, resume, world)
    if options.task == "regress":
        run.spread = max(float(np.var(np.array(examples["train"].labels, np.float64))), 1e-12)
    run.restore(found.model)
    return found, examples


def _targets(rows: Examples, labels: Labels | None, options: FinetuneOptions) -> np.ndarray:
    """Return the classes, the numbers, or for a search the numbers of the second texts."""
    if options.task == "embed":
        return numbered(rows.seconds)[0]
    if labels is None:
        return np.array(rows.labels, np.float32)
    return np.array(labels.numbers(rows), np.int64)


def _trained(
    run: FinetuneRun, found: Prepared, facts: dict[str, Any], bar: bool | None, device: str | None, world: int
) -> Finetuned:
    """Run what is left of the training, take the best state, measure it, and report."""
    options, model = run.options, found.model
    cached = getattr(getattr(model, "config", None), "use_cache", None)
    if run.finished is None:
        with sparse_rows(model, options.optimizer == "lazy-adam"), interrupts() as stop:
            run.stop = stop
            trainer = _trainer(run, model, device, world)
            drive(run, trainer, bar)
            if not run.measured_now():
                run.journal.row(run.step, run.tokens, run.seconds(), 0.0, run.measure(trainer))
            if world > 1:
                dist.barrier()  # the first process may still be writing the best state
            run.take_best(model)
            tested = None
            if "test" in run.corpus.parts:
                tested = figures(options.task, *trainer.answers("test"), seed=options.seed)
            run.finished = {
                "test": tested, "loss": run.journal.state()["last"], "seconds": run.seconds(), "busy": run.busy,
                "processes": world, "device": trainer.args.device.type,
            }  # fmt: skip
            if world > 1:
                dist.barrier()  # before the first process removes the best state
            run.save(model, trainer.inner_optimiser, run.finished)
            trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if cached is not None:
        model.config.use_cache = cached
    model.eval()
    return Finetuned(model, found.tokenizer, _report(run, run.finished, facts))


def _trainer(run: FinetuneRun, model: Any, device: str | None, world: int) -> Any:
    from nogemm.train.loop.trainer import arguments_for

    if run.options.task != "embed":
        from nogemm.train.task.trainer import LabelTrainer

        return LabelTrainer(model, arguments_for(run, device, world), run)
    from sentence_transformers import SentenceTransformerTrainingArguments

    from nogemm.train.task.embedding import EmbeddingTrainer

    share = run.options.batch // world
    arguments = arguments_for(run, device, world, SentenceTransformerTrainingArguments, share)
    return EmbeddingTrainer(model, arguments, run)


def _facts(
    found: Prepared, run: FinetuneRun, examples: dict[str, Examples], data: Any, source: Any
) -> dict[str, Any]:  # fmt: skip
    """Return what is known of a run before it begins."""
    module = isinstance(source, nn.Module)
    return {
        "parameters": parameter_counts(found.model),
        "model": {
            "architecture": type(found.model).__name__,
            "from": "module" if module else "checkpoint",
            "new_head": found.fresh,
            "ffn": {name: layer.config.to_dict() for name, layer in converted(found.model).items()},
        },
        "data": {
            "source": source_name(data),
            "rows": {part: len(rows) for part, rows in examples.items()},
            "left_out": {part: rows.left_out for part, rows in examples.items()},
            "labels": {} if found.labels is None else counted(examples["train"], found.labels.names),
            "max_length": found.max_length,
        },
    }


def _report(run: FinetuneRun, finished: dict[str, Any], facts: dict[str, Any]) -> FinetuneReport:
    options, best = run.options, run.best
    assert best is not None
    row = next(row for row in run.history if row["step"] == best["step"])
    names = ("validation_loss", *METRICS[options.task])
    return FinetuneReport(
        task=options.task,
        metric=options.chosen_metric,
        best=best,
        validation={name: row[name] for name in names if name in row},
        test=finished["test"],
        epochs=run.epochs,
        options=options.to_dict(),
        **run_counts(run, finished),
        **facts,
    )
