"""Kind "distil": every run converts a dense model and distils it from itself by `nogemm.distil`."""

from __future__ import annotations

import dataclasses
from itertools import islice
from typing import Any

import torch

from nogemm.config import LayerConfig, layer_config
from nogemm.convert import convert
from nogemm.convert.sites import survey
from nogemm.convert.token_ids import vocabulary_of
from nogemm.errors import ConfigError
from nogemm.models.depth import keep_layers
from nogemm.models.inner import inner_model
from nogemm.models.loading import load_model, load_tokenizer
from nogemm.shape import FFNShape
from nogemm.study.kinds._base import Job, Metric, Save, model_cost
from nogemm.train.distil import distil
from nogemm.train.guards import FREE
from nogemm.train.options import DistilOptions
from nogemm.train.reader import SAMPLE
from nogemm.train.sources import texts

_RATES = ("lr_projection", "lr_tables", "lr_other", "lr_backbone")
_BUDGETS = ("tokens", "max_seconds")
_TUPLES = ("hidden_map", "pair")


class DistilKind:
    """Converted models that learn from the dense one."""

    name = "distil"
    metric = Metric("agreement", "agreement", False)
    needs_model = True
    free = frozenset(FREE)

    def __init__(self) -> None:
        self._vocabulary = 0

    def option_names(self) -> list[str]:
        return [field.name for field in dataclasses.fields(DistilOptions) if field.name != "seed"]

    def options(self, preset: Any, choices: dict[str, Any], layer: LayerConfig | None) -> DistilOptions:
        if preset is not None:
            raise ConfigError("preset is for kind train")
        return options_of(choices)

    def changed(self, choices: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        return {**choices, **changes}

    def scaled(self, options: DistilOptions, factor: float) -> DistilOptions:
        return dataclasses.replace(options, **{name: getattr(options, name) * factor for name in _RATES})

    def shape_key(self, options: DistilOptions) -> Any:
        return None

    def shape(self, options: DistilOptions, model: str | None) -> FFNShape:
        assert model is not None
        found = load_model(model)
        self._vocabulary = vocabulary_of(inner_model(found))
        sites = survey(found).open
        if not sites:
            raise ConfigError(f"{model} has no FFN that can be replaced")
        return sites[0].shape

    def vocabulary(self, options: DistilOptions) -> int:
        return self._vocabulary

    def budget(self, options: DistilOptions) -> float | None:
        return None if options.tokens is None else float(options.tokens)

    def run(self, job: Job, save: Save) -> dict[str, Any]:
        assert job.model is not None
        options = options_of(job.options)
        torch.manual_seed(options.seed)
        tokenizer = load_tokenizer(job.tokenizer or job.model)
        model, teacher = load_model(job.model), load_model(job.model)
        if job.keep is not None:
            kept = keep_layers(model, job.keep)
            if options.hidden_map is None:
                options = dataclasses.replace(options, hidden_map=kept)
        if job.layer is not None:
            start = None
            if job.fit:
                start = list(islice(texts(job.data, options.field), job.fit))
            convert(model, layer_config(job.layer), job.layers, start, tokenizer=tokenizer, faster_at=None)
        validation: Any = job.validation
        if job.split is not None and job.validation is not None:
            validation = list(texts(job.validation, options.field, job.split))
        if validation is None and job.data != SAMPLE:
            raise ConfigError("kind distil compares by agreement: name validation texts")
        report = distil(
            model, teacher, job.data, tokenizer=tokenizer, validation=validation, output_dir=job.folder, resume=True,
            bar=False, options=options,
        ).to_dict()  # fmt: skip
        report |= {"data": job.data.rpartition("/")[2]}
        figures = {name: report[name] for name in ("agreement", "tokens", "seconds", "history")}
        trained = sum(stage["seconds"] for stage in report["stages"])
        figures |= {"tokens_per_second": report["tokens"] / max(trained, 1e-9)} | model_cost(model)
        save(model.eval(), tokenizer)
        return {"figures": figures, "report": report}


def options_of(choices: dict[str, Any]) -> DistilOptions:
    """Make the options from JSON values."""
    tuples = {name: tuple(choices[name]) for name in _TUPLES if isinstance(choices.get(name), list)}
    if isinstance(choices.get("field"), list):
        tuples["field"] = tuple(choices["field"])
    return DistilOptions(**{**choices, **tuples})
