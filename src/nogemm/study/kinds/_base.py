"""What a kind of study says: which options a run has, which of them are learning rates, and how a run is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nogemm.config import LayerConfig, layer_config
from nogemm.convert import convert
from nogemm.convert.convert import dense_cost
from nogemm.convert.sites import converted, survey
from nogemm.convert.token_ids import vocabulary_of
from nogemm.cost import Cost
from nogemm.errors import ConfigError
from nogemm.models.depth import keep_layers
from nogemm.models.inner import inner_model
from nogemm.models.loading import load_model
from nogemm.shape import FFNShape
from nogemm.study.sources import Source
from nogemm.train.sources import texts


@dataclass(frozen=True)
class Metric:
    """What runs are compared by.

    Attributes:
        name: in a run's figures.
        label: for readers.
        lower: whether less is better.
    """

    name: str
    label: str
    lower: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, as its process gets it.

    Attributes:
        kind: of the study.
        trial: whether it only tries a rate.
        options: of the run, all resolved, as JSON values.
        layer: config of the layer as JSON values, or None.
        layers, keep, fit, model: see `nogemm.study.plan.Row`.
        data, validation, split, test: see `nogemm.study.sources.Source`.
        tokenizer: see `nogemm.study.plan.Study`.
        folder: of the run, for its log and checkpoints.
        shared: folder of what all runs read: tokens, and a tokenizer.
        save: where the trained model goes; None: nowhere.
    """

    kind: str
    trial: bool
    options: dict[str, Any]
    layer: dict[str, Any] | None
    layers: Any
    keep: list[int] | None
    fit: int
    data: str
    validation: str | None
    split: str | None
    test: str | None
    tokenizer: str | None
    model: str | None
    folder: str
    shared: str
    save: str | None

    def place(self) -> Path:
        """Return the run's folder."""
        return Path(self.folder)


@dataclass(frozen=True)
class Site:
    """What a row's layer has to fit.

    Attributes:
        owner: the model's class, for messages.
        shape: of the first dense FFN; None: the model has none.
        vocabulary: how many token ids the model knows, or a guess from above.
    """

    owner: str
    shape: FFNShape | None
    vocabulary: int

    def one_shape(self) -> FFNShape:
        """Return the shape, or raise ConfigError."""
        if self.shape is None:
            raise ConfigError(f"{self.owner} has no FFN that can be replaced")
        return self.shape


Save = Callable[[nn.Module, Any], None]


class Kind(Protocol):
    """A kind of study; `nogemm.study.kinds.KINDS` lists them."""

    name: str
    method: str | None
    """Of a row that names none; None: its FFNs stay."""
    needs_model: bool
    tests: bool
    """Whether runs are measured on test rows of their own."""
    free: frozenset[str]
    """Options that may change without making old results others."""

    def metric(self, options: Any) -> Metric:
        """Return what runs of these options are compared by."""
        ...

    def check_source(self, source: Source, where: str) -> None:
        """Raise ConfigError where a source lacks what runs need, or has what they cannot use."""
        ...

    def option_names(self) -> list[str]:
        """List the options that `common` and rows may set."""
        ...

    def options(self, preset: Any, choices: dict[str, Any], layer: LayerConfig | None) -> Any:
        """Make a run's options; raises ConfigError."""
        ...

    def changed(self, choices: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        """Return choices with some replaced; a budget among the changes takes the place of all budgets."""
        ...

    def scaled(self, options: Any, factor: float) -> Any:
        """Return options with all learning rates multiplied."""
        ...

    def shape_key(self, options: Any) -> Any:
        """Return what the shape of the FFNs depends on."""
        ...

    def site(self, options: Any, model: str | None, keep: Sequence[int] | None) -> Site:
        """Look at the FFNs that a row's layer replaces; raises ConfigError where layers to keep are not there."""
        ...

    def budget(self, options: Any) -> float | None:
        """Return the tokens that a run reads, None where time alone ends it."""
        ...

    def run(self, job: Job, save: Save) -> dict[str, Any]:
        """Run in this process, and return {"figures", "report"}; `save` gets model and tokenizer, once, at the end."""
        ...


def site_of(model: Any, vocabulary: int) -> Site:
    """Return the site of a model."""
    found = survey(model).open
    return Site(type(model).__name__, found[0].shape if found else None, vocabulary)


def loaded_site(model: str, keep: Sequence[int] | None) -> Site:
    """Return the site of a stored model, some of its layers left out."""
    found = load_model(model)
    if keep is not None:
        keep_layers(found, keep)
    return site_of(found, vocabulary_of(inner_model(found)))


def change(model: nn.Module, job: Job, tokenizer: Any, field: Any) -> tuple[int, ...] | None:
    """Leave out layers and replace FFNs as a run's row says.

    Args:
        field: of the data, that holds the texts of a start in closed form.
    Returns:
        the layers that stay as `hidden_map` counts them; None: all do.
    """
    kept = None if job.keep is None else keep_layers(model, job.keep)
    if job.layer is not None:
        start = list(islice(texts(job.data, field), job.fit)) if job.fit else None
        convert(model, layer_config(job.layer), job.layers, start, tokenizer=tokenizer, faster_at=None)
    return kept


def validation_of(job: Job, field: Any) -> Any:
    """Return the texts to choose by: a name, or those of one split of a file."""
    if job.split is None or job.validation is None:
        return job.validation
    return list(texts(job.validation, field, job.split))


def model_cost(model: nn.Module) -> dict[str, Any]:
    """Return what a model's FFNs cost for a token, those that were left dense included, and its parameters."""
    layers = [layer.cost(1) for layer in converted(model).values()]
    dense = [dense_cost(site) for site in survey(model).open]
    total = sum([*layers, *dense], Cost(0.0, 0.0, 0))
    return {
        "ffn_flops": total.flops,
        "ffn_bytes": total.bytes_read,
        "ffn_parameters": total.parameters,
        "parameters": sum(p.numel() for p in model.parameters()),
        "ffns": len(layers) + len(dense),
    }
