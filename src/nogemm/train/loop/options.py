"""The choices that every training run has, and how the choices of a command are checked.

Reading order: `LoopOptions`, `check_options`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nogemm.errors import ConfigError
from nogemm.train.options import Optimizer

Decay = Literal["linear", "cosine", "constant"]
Precision = Literal["fp32", "bf16"]
Range = tuple[str, float, float]

FREE = frozenset({"log_steps", "log_seconds", "checkpoint_seconds", "checkpoint_steps", "tensorboard"})
"""Options that may change when a run is resumed."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """What any run by the shared loop can be told; a command's own options say what each field means."""

    tokens: int | None = None
    steps: int | None = None
    max_seconds: float | None = None
    batch: int = 32
    micro_batch: int | None = None
    lr: float = 5e-4
    lr_projection: float | None = None
    lr_tables: float | None = None
    lr_other: float | None = None
    warmup: float = 0.05
    decay: Decay = "linear"
    final: float = 0.0
    weight_decay: float = 0.01
    decay_tables: bool = False
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip: float = 1.0
    refit_steps: int = 100
    optimizer: Optimizer = "adamw"
    precision: Precision = "fp32"
    seed: int = 0
    validation_share: float = 0.01
    validate_steps: int = 0
    log_steps: int = 10
    log_seconds: float = 10.0
    checkpoint_seconds: float = 120.0
    checkpoint_steps: int = 0
    tensorboard: bool = False

    def rate(self, group: str) -> float:
        """Return the peak learning rate of a group of parameters."""
        own = getattr(self, f"lr_{group}", None)
        return self.lr if own is None else own

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def option_types(cls: type[LoopOptions]) -> dict[str, str]:
    """Return the type of every option, as it is written."""
    return {field.name: str(field.type) for field in dataclasses.fields(cls)}


def check_options(
    options: LoopOptions,
    caller: str,
    ranges: Iterable[Range] = (),
    choices: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """Check numbers and words of a command's options.

    Args:
        caller: starts every message.
        ranges, choices: of the options that the shared ones lack.
    Raises:
        ConfigError: a value out of its range, or a word that is none of the known ones.
    """
    types = option_types(type(options))
    for name, low, high in (*RANGES, *ranges):
        value = getattr(options, name)
        whole = types[name].startswith("int")
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ConfigError(f"{caller}: {name} must be a {'whole ' * whole}number, got {name}={value!r}")
        if not low <= value <= high:
            raise ConfigError(f"{caller}: {name} must lie between {low} and {high}, got {name}={value!r}")
    for name, words in (CHOICES | dict(choices or {})).items():
        if getattr(options, name) not in words:
            raise ConfigError(f"{caller}: {name} must be one of {', '.join(words)}, got {getattr(options, name)!r}")


def refuse_unknown(cls: type[LoopOptions], given: Iterable[str], caller: str) -> None:
    """Raise ConfigError for a name that is no option of the command."""
    known = option_types(cls)
    for name in given:
        if name not in known:
            raise ConfigError(f"{caller} has no option {name!r}; it has: {', '.join(known)}")


LARGE = float("inf")
RANGES: tuple[Range, ...] = (
    *((name, 1, LARGE) for name in ("tokens", "steps", "batch", "micro_batch", "log_steps", "refit_steps")),
    *((name, 0, LARGE) for name in ("lr", "lr_projection", "lr_tables", "lr_other", "weight_decay", "clip", "seed")),
    *((name, 0, LARGE) for name in ("max_seconds", "log_seconds", "checkpoint_seconds", "checkpoint_steps")),
    ("validate_steps", 0, LARGE),
    ("warmup", 0, 1),
    ("final", 0, 1),
    ("beta1", 0, 0.9999),
    ("beta2", 0, 0.999999),
    ("eps", 1e-30, 1),
    ("validation_share", 0, 0.5),
)
CHOICES: dict[str, tuple[str, ...]] = {
    "decay": get_args(Decay),
    "precision": get_args(Precision),
    "optimizer": get_args(Optimizer),
}
