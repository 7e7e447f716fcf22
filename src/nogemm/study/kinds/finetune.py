"""Kind "finetune": every run fine-tunes a stored model by `nogemm.finetune`; rows differ in the model or its FFNs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from nogemm.config import LayerConfig
from nogemm.convert.save import save_like
from nogemm.errors import ConfigError
from nogemm.models.loading import load_both
from nogemm.study.kinds._base import Job, Metric, Save, Site, change, loaded_site, model_cost
from nogemm.study.sources import Source
from nogemm.train.loop.options import FREE
from nogemm.train.task.finetune import finetune
from nogemm.train.task.options import BUDGETS, FinetuneOptions, finetune_options

_RATES = ("lr", "lr_projection", "lr_tables", "lr_other", "lr_head", "lr_backbone")
_LABELS = {
    "accuracy": "accuracy", "macro_f1": "macro F1", "matthews": "Matthews' coefficient", "pearson": "Pearson's r",
    "spearman": "Spearman's rank correlation", "mrr_at_10": "MRR@10", "recall_at_10": "recall@10",
}  # fmt: skip
TEST, VALIDATION = "test", "validation"


class FinetuneKind:
    """Stored models that learn a task, from labels, numbers or pairs."""

    name = "finetune"
    method: str | None = None
    needs_model = True
    tests = True
    free = FREE

    def metric(self, options: FinetuneOptions) -> Metric:
        name = options.chosen_metric
        return Metric(name, _LABELS[name], False)

    def check_source(self, source: Source, where: str) -> None:
        if source.split is not None:
            raise ConfigError(f"{where}: validation: split is for kinds train and distil; rows name their own")

    def option_names(self) -> list[str]:
        return [field.name for field in dataclasses.fields(FinetuneOptions) if field.name != "seed"]

    def options(self, preset: Any, choices: dict[str, Any], layer: LayerConfig | None) -> FinetuneOptions:
        if preset is not None:
            raise ConfigError("preset is for kind train")
        return finetune_options(**choices)

    def changed(self, choices: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        if any(name in changes for name in BUDGETS):
            choices = {name: value for name, value in choices.items() if name not in BUDGETS}
        return {**choices, **changes}

    def scaled(self, options: FinetuneOptions, factor: float) -> FinetuneOptions:
        given = {name: getattr(options, name) for name in _RATES}
        return dataclasses.replace(options, **{name: v * factor for name, v in given.items() if v is not None})

    def shape_key(self, options: FinetuneOptions) -> Any:
        return None

    def site(self, options: FinetuneOptions, model: str | None, keep: Sequence[int] | None) -> Site:
        assert model is not None
        return loaded_site(model, keep)

    def budget(self, options: FinetuneOptions) -> float | None:
        return None if options.tokens is None else float(options.tokens)

    def run(self, job: Job, save: Save) -> dict[str, Any]:
        options = FinetuneOptions(**job.options)
        found = finetune(
            started(job, options), job.data, validation=job.validation, test=job.test, output_dir=job.folder,
            resume=True, bar=False, options=options,
        )  # fmt: skip
        report = found.report.to_dict()
        # A rate is chosen on the validation rows; the test rows are looked at once, by the final run.
        tested = None if job.trial else report["test"]
        report["test"] = tested
        name, best = options.chosen_metric, report["best"]["value"]
        figures = {name: best if tested is None else tested[name]["value"]}
        figures |= {"measured_on": VALIDATION if tested is None else TEST, "validation": best}
        counts = ("loss", "tokens", "steps", "epochs", "seconds", "training_seconds", "tokens_per_second", "history")
        figures |= {count: report[count] for count in counts} | model_cost(found.model)
        save(found.model, found.tokenizer)
        return {"figures": figures, "report": report}


def started(job: Job, options: FinetuneOptions) -> str:
    """Return the directory or name of the model that a run begins with, changed as its row says."""
    assert job.model is not None
    folder = job.place() / "start"
    if job.layer is None and job.keep is None:
        return job.model
    if not folder.is_dir():  # a run that goes on has it
        torch.manual_seed(options.seed)
        model, tokenizer = load_both(job.model)
        change(model, job, tokenizer, options.text)
        with warnings.catch_warnings():  # training is what makes something of random tables
            warnings.simplefilter("ignore")
            save_like(model, job.model, folder, tokenizer)
    return str(folder)
