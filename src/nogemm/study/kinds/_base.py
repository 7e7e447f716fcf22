"""What a kind of study says: which options a run has, which of them are learning rates, and how a run is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from nogemm.config import LayerConfig
from nogemm.convert.convert import dense_cost
from nogemm.convert.sites import converted, survey
from nogemm.cost import Cost
from nogemm.shape import FFNShape


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
        options: of the run, all resolved, as JSON values.
        layer: config of the layer as JSON values, or None.
        layers, keep, fit: see `nogemm.study.plan.Row`.
        data, validation, split, tokenizer, model: see `nogemm.study.plan.Study`.
        folder: of the run, for its log and checkpoints.
        shared: folder of what all runs read: tokens, and a tokenizer.
        save: where the trained model goes; None: nowhere.
    """

    kind: str
    options: dict[str, Any]
    layer: dict[str, Any] | None
    layers: Any
    keep: list[int] | None
    fit: int
    data: str
    validation: str | None
    split: str | None
    tokenizer: str | None
    model: str | None
    folder: str
    shared: str
    save: str | None

    def place(self) -> Path:
        """Return the run's folder."""
        return Path(self.folder)


Save = Callable[[nn.Module, Any], None]


class Kind(Protocol):
    """A kind of study; `nogemm.study.kinds.KINDS` lists them."""

    name: str
    metric: Metric
    needs_model: bool
    free: frozenset[str]
    """Options that may change without making old results others."""

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

    def shape(self, options: Any, model: str | None) -> FFNShape:
        """Return the shape of the FFNs that a row's layer replaces; raises ConfigError."""
        ...

    def vocabulary(self, options: Any) -> int:
        """Return how many token ids the model knows, or a guess from above."""
        ...

    def budget(self, options: Any) -> float | None:
        """Return the tokens that a run reads, None where time alone ends it."""
        ...

    def run(self, job: Job, save: Save) -> dict[str, Any]:
        """Run in this process, and return {"figures", "report"}; `save` gets model and tokenizer, once, at the end."""
        ...


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
