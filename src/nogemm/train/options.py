"""Every choice of a distillation run, in one frozen dataclass, and what the run reports when it ends."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from nogemm.errors import ConfigError

Output = Literal["auto", "embedding", "logits", "mlm", "none"]
Optimizer = Literal["adamw", "lazy-adam"]


@dataclass(frozen=True, kw_only=True)
class DistilOptions:
    """What `distil` does and how long.

    Attributes:
        tokens: budget, padding not counted; None leaves the time alone to decide.
        max_seconds: budget in seconds from the call on, tokenising included; None means no limit. Whichever of the two
            budgets is used up first ends the run, and the learning rates fall to zero towards that point. A run that
            time ends depends on the machine's speed; one that tokens end is reproducible.
        stage1_share: part of the budget that fits layers alone; the rest trains the whole model.
        batch_tokens: tokens in a batch, padding included.
        updates_per_batch: optimiser steps for each teacher pass of stage 1, each on its share of the tokens.
        max_length: longer texts are cut to this many tokens, or to what the tokenizer and the positions allow.
        seed: order of the data.
        lr_projection: learning rate of the hash projections.
        lr_tables: learning rate of the tables.
        lr_other: learning rate of what else the new layers hold (biases, inner norms, dense matrices).
        stage2_rate: factor on the rates of projections, tables and others in stage 2, where they are already fitted.
        lr_backbone: learning rate of the rest of the model in stage 2; 0 freezes it.
        weight_decay: of matrices outside the tables.
        optimizer: "adamw", or "lazy-adam": a TreeFFN's gradients hold the visited rows alone, and only those rows are
            stepped (see `LazyAdam`); all else is stepped as by AdamW.
        train_embeddings: also train token embeddings in stage 2 (large, and most rows see few tokens).
        warmup: part of a stage over which the rates rise from zero.
        clip: largest gradient norm, for each new layer in stage 1 and for the model in stage 2.
        hidden_weight: weight of the hidden states' loss in stage 2.
        output_weight: weight of the task output's loss in stage 2.
        output: "embedding" (as `modules.json` pools it, else the mean, of length one), "logits" (of classes, of labels
            or as numbers, as `losses.output_kind` finds), "mlm" (logits of tokens that teacher and model see masked),
            "none" (hidden states alone), or "auto": logits where the model has them, the embedding otherwise.
        hidden_map: for a model with fewer layers than the teacher: for every layer of the model, which of the teacher's
            hidden states (1 = after its first layer) it should reproduce.
        solve_tokens: tokens over whose activations the tables are solved for at the end of stage 1 (0: not at all).
        log_seconds: time between two lines of the log or table of losses.
        checkpoint_seconds: time between two checkpoints; one is also written at the end of a stage, at the end
            of the run and on Ctrl-C.
        validate_tokens: tokens between two measurements of agreement on the validation texts; 0 measures at the end.
        patience: stop when this many measurements in a row brought no better agreement; 0 never does.
        target: stop when the agreement reaches this.
        field: which fields of JSONL or CSV rows hold text, each a text of its own; None tries the usual names.
        pair: two fields that the model reads together as one input, such as a reranker's ("query", "document").
    """

    tokens: int | None = 1_000_000
    max_seconds: float | None = None
    stage1_share: float = 0.3
    batch_tokens: int = 1024
    updates_per_batch: int = 2
    max_length: int = 128
    seed: int = 0
    lr_projection: float = 2e-3
    lr_tables: float = 5e-3
    lr_other: float = 2e-3
    stage2_rate: float = 0.2
    lr_backbone: float = 2e-4
    weight_decay: float = 0.0
    optimizer: Optimizer = "adamw"
    train_embeddings: bool = False
    warmup: float = 0.02
    clip: float = 1.0
    hidden_weight: float = 1.0
    output_weight: float = 10.0
    output: Output = "auto"
    hidden_map: tuple[int, ...] | None = None
    solve_tokens: int = 0
    log_seconds: float = 10.0
    checkpoint_seconds: float = 120.0
    validate_tokens: int = 0
    patience: int = 0
    target: float | None = None
    field: str | tuple[str, ...] | None = None
    pair: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.tokens is None and self.max_seconds is None:
            raise ConfigError("distil needs a budget: tokens or max_seconds")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"distil: {name} must lie between {low} and {high}, got {name}={value!r}")
        if self.output not in OUTPUTS:
            raise ConfigError(f"distil: output must be one of {', '.join(OUTPUTS)}, got {self.output!r}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(f"distil: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if (self.patience or self.target is not None) and not self.validate_tokens:
            raise ConfigError("distil: patience and target need validate_tokens")

        if self.pair is not None and (isinstance(self.pair, str) or len(self.pair) != 2):
            raise ConfigError(f'distil: pair must name two fields, such as ("query", "document"), got {self.pair!r}')
        if self.pair is not None and self.field is not None:
            raise ConfigError(f"distil: give field or pair, not both: got field={self.field!r}, pair={self.pair!r}")
        silent = self.hidden_weight == 0 and (self.output_weight == 0 or self.output == "none")
        if silent and self.stage1_share < 1:
            raise ConfigError(
                "distil: with hidden_weight=0 and no loss on the output (output_weight=0 or output='none') the second "
                "stage has nothing to learn: give one of them a weight, or stage1_share=1"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return asdict(self)


OUTPUTS = get_args(Output)
OPTIMIZERS = get_args(Optimizer)
_LARGE = float("inf")
_RANGES = (
    ("tokens", 1, _LARGE),
    ("max_seconds", 0, _LARGE),
    ("stage1_share", 0, 1),
    ("batch_tokens", 1, _LARGE),
    ("updates_per_batch", 1, _LARGE),
    ("max_length", 2, _LARGE),
    ("warmup", 0, 1),
    ("clip", 0, _LARGE),
    ("lr_projection", 0, _LARGE),
    ("lr_tables", 0, _LARGE),
    ("lr_other", 0, _LARGE),
    ("lr_backbone", 0, _LARGE),
    ("stage2_rate", 0, _LARGE),
    ("weight_decay", 0, _LARGE),
    ("hidden_weight", 0, _LARGE),
    ("output_weight", 0, _LARGE),
    ("solve_tokens", 0, _LARGE),
    ("checkpoint_seconds", 0, _LARGE),
    ("validate_tokens", 0, _LARGE),
    ("patience", 0, _LARGE),
)


@dataclass
class StageReport:
    """One stage: how long, and every loss at its beginning (mean of ten steps) and end (running mean of about ten)."""

    name: str
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def add(self, losses: dict[str, float], seconds: float, tokens: int) -> None:
        """Take one more step into account; `seconds` are the stage's, `tokens` the whole run's so far."""
        self.steps += 1
        self.seconds, self.tokens = seconds, tokens
        for name, value in losses.items():
            if self.steps <= 10:
                self.first[name] = self.first.get(name, 0.0) + (value - self.first.get(name, 0.0)) / self.steps
            old = self.last.get(name, value)
            self.last[name] = old + (value - old) * 0.1


@dataclass
class DistilReport:
    """What a run did. `stopped` is "budget", "patience" or "target"; `agreement` is None without validation texts."""

    stages: list[StageReport]
    tokens: int
    seconds: float
    stopped: str
    agreement: float | None
    history: list[dict[str, float]]
    options: dict[str, Any]
    data: str

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)
