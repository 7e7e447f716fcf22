"""Kind "distil": every run converts a dense model and distils it from itself by `nogemm.distil`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from nogemm.config import LayerConfig
from nogemm.errors import ConfigError
from nogemm.models.loading import load_model, load_tokenizer
from nogemm.study.kinds._base import Job, Metric, Save, Site, change, loaded_site, model_cost, validation_of
from nogemm.study.sources import Source
from nogemm.train.distil import distil
from nogemm.train.guards import FREE
from nogemm.train.options import DistilOptions
from nogemm.train.reader import SAMPLE

_RATES = ("lr_projection", "lr_tables", "lr_other", "lr_backbone")
_TUPLES = ("hidden_map", "pair")


class DistilKind:
    """Converted models that learn from the dense one."""

    name = "distil"
    method: str | None = "dense"
    needs_model = True
    tests = False
    free = frozenset(FREE)

    def metric(self, options: DistilOptions) -> Metric:
        return Metric("agreement", "agreement", False)

    def check_source(self, source: Source, where: str) -> None:
        if source.validation is None and source.data != SAMPLE:
            raise ConfigError(f"{where}: kind distil compares by agreement: name validation texts")

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

    def site(self, options: DistilOptions, model: str | None, keep: Sequence[int] | None) -> Site:
        assert model is not None
        return loaded_site(model, keep)

    def budget(self, options: DistilOptions) -> float | None:
        return None if options.tokens is None else float(options.tokens)

    def run(self, job: Job, save: Save) -> dict[str, Any]:
        assert job.model is not None
        options = options_of(job.options)
        torch.manual_seed(options.seed)
        tokenizer = load_tokenizer(job.tokenizer or job.model)
        model, teacher = load_model(job.model), load_model(job.model)
        kept = change(model, job, tokenizer, options.field)
        if kept is not None and options.hidden_map is None:
            options = dataclasses.replace(options, hidden_map=kept)
        report = distil(
            model, teacher, job.data, tokenizer=tokenizer, validation=validation_of(job, options.field),
            output_dir=job.folder, resume=True, bar=False, options=options,
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
