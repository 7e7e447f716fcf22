"""Kind "train": every run trains a language model by `nogemm.train_model`; rows differ in the layer of its FFNs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nogemm.config import LayerConfig, layer_config
from nogemm.models.loading import load_model, load_tokenizer
from nogemm.study.kinds._base import Job, Metric, Save, Site, model_cost, site_of, validation_of
from nogemm.study.sources import Source
from nogemm.train.identity import data_identity
from nogemm.train.lm.corpus import is_sample, open_corpus, training_texts
from nogemm.train.lm.models import new_model
from nogemm.train.lm.options import BUDGETS, OF_NEW_MODELS, TrainOptions, train_options
from nogemm.train.lm.tokenizer import save_tokenizer, train_tokenizer
from nogemm.train.lm.train import train_model
from nogemm.train.loop.options import FREE

_RATES = ("lr", "lr_projection", "lr_tables", "lr_other")
_LEFT_OUT = ("ffn", "seed")
"""Options that rows and seeds say themselves."""


class TrainKind:
    """Masked and causal language models from text."""

    name = "train"
    method: str | None = "dense"
    needs_model = False
    tests = False
    free = FREE

    def metric(self, options: TrainOptions) -> Metric:
        return Metric("validation_loss", "validation loss", True)

    def check_source(self, source: Source, where: str) -> None:
        pass

    def option_names(self) -> list[str]:
        return [field.name for field in dataclasses.fields(TrainOptions) if field.name not in _LEFT_OUT]

    def options(self, preset: Any, choices: dict[str, Any], layer: LayerConfig | None) -> TrainOptions:
        return train_options(preset, **choices, ffn=layer)

    def changed(self, choices: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        if any(name in changes for name in BUDGETS):
            choices = {name: value for name, value in choices.items() if name not in BUDGETS}
        return {**choices, **changes}

    def scaled(self, options: TrainOptions, factor: float) -> TrainOptions:
        given = {name: getattr(options, name) for name in _RATES}
        return dataclasses.replace(options, **{name: v * factor for name, v in given.items() if v is not None})

    def shape_key(self, options: TrainOptions) -> Any:
        return tuple(getattr(options, name) for name in (*OF_NEW_MODELS, "task") if name != "layers")

    def site(self, options: TrainOptions, model: str | None, keep: Sequence[int] | None) -> Site:
        if model is None:
            one = dataclasses.replace(options, layers=1, ffn=None)
            return site_of(new_model(one, _Ids()), options.vocabulary)
        return site_of(load_model(model, options.task), options.vocabulary)

    def budget(self, options: TrainOptions) -> float | None:
        steps = None if options.steps is None else options.steps * options.batch * options.context
        known = [value for value in (options.tokens, steps) if value is not None]
        return None if not known else float(min(known))

    def run(self, job: Job, save: Save) -> dict[str, Any]:
        given = dict(job.options)
        ffn = given.pop("ffn")
        options = TrainOptions(**given, ffn=None if ffn is None else layer_config(ffn))
        validation = validation_of(job, options.field)
        tokenizer = shared_tokens(job, options, validation)
        found = train_model(
            job.data, model=job.model, tokenizer=tokenizer, validation=validation, output_dir=job.folder, resume=True,
            bar=False, options=options,
        )  # fmt: skip
        report = found.report.to_dict()
        names = ("validation_loss", "perplexity", "loss", "tokens", "steps", "epochs", "seconds", "training_seconds")
        figures = {name: report[name] for name in (*names, "tokens_per_second", "history")}
        figures |= model_cost(found.model) | {"flops_per_token": report["flops_per_token"]}
        save(found.model, found.tokenizer)
        return {"figures": figures, "report": report}


def shared_tokens(job: Job, options: TrainOptions, validation: Any) -> Any:
    """Tokenise once for all runs of a budget, put links into the run's folder, and return the tokenizer."""
    from transformers import AutoTokenizer

    shared, hidden = Path(job.shared), validation is None and not is_sample(job.data)
    if job.tokenizer is not None:
        tokenizer = load_tokenizer(job.tokenizer)
    elif job.model is not None and Path(job.model).suffix != ".json":
        tokenizer = load_tokenizer(job.model)
    else:
        share = options.validation_share if hidden else 0.0
        learnt = (options.vocabulary, options.task, options.field, share, data_identity(job.data, tuple))
        folder = shared / f"tokenizer-{_digest(*learnt)}"
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            rows = training_texts(job.data, options.field, share)
            save_tokenizer(train_tokenizer(rows, options.vocabulary, framed=options.task == "mlm"), folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    names = ("vocabulary", "task", "field", "validation_share", "validation_tokens", "data_tokens", *BUDGETS[:2])
    sources = [data_identity(source, tuple) for source in (job.data, validation)]
    words = (*(getattr(options, name) for name in names), options.batch * options.context, *sources, job.split)
    tokens = shared / f"tokens-{_digest(*words)}"
    open_corpus(options, tokens, job.data, validation, tokenizer, resume=True)
    job.place().mkdir(parents=True, exist_ok=True)
    for name in ("tokens", "validation"):
        link = job.place() / name
        if not link.exists():
            link.unlink(missing_ok=True)  # it led to tokens that are gone
            link.symlink_to(os.path.relpath(tokens / name, job.place()), target_is_directory=True)
    return tokenizer


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


class _Ids(SimpleNamespace):
    """What a new model asks a tokenizer for, before there is one."""

    pad_token_id, bos_token_id, eos_token_id = 1, 0, 2
    cls_token_id, sep_token_id, mask_token_id = 0, 2, 4

    def __len__(self) -> int:
        return 300
