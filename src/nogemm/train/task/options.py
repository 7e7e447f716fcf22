"""Every choice of a fine-tuning run, in one frozen dataclass.

Reading order: `FinetuneOptions`, `finetune_options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from nogemm.errors import ConfigError
from nogemm.models.pooling import MODES
from nogemm.train.loop.options import LARGE, LoopOptions, check_options, refuse_unknown

Task = Literal["classify", "pairs", "regress", "embed"]
Head = Literal["auto", "new"]

METRICS: dict[str, tuple[str, ...]] = {
    "classify": ("accuracy", "macro_f1", "matthews"),
    "pairs": ("accuracy", "macro_f1", "matthews"),
    "regress": ("pearson", "spearman"),
    "embed": ("mrr_at_10", "recall_at_10"),
}
"""What is measured of each task; the first one chooses where no metric is named."""
EPOCHS = 3.0
"""Of a run without any budget."""


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(LoopOptions):
    """What `finetune` trains, how and how long.

    Attributes:
        task: "classify" (a text has a label), "pairs" (two texts together have one), "regress" (a text, or two
            together, have a number), or "embed" (the embeddings of two texts that belong together come close).
        text, text2, label: fields of a row; None: "text", "text2" and "label", or those of the GLUE task. A text2
            makes the input of "regress" a pair.
        epochs, tokens, steps, max_seconds: the budget: passes over the data, tokens without padding, updates, seconds.
            Whichever is used up first ends the run, and rates reach their end there; without any, three epochs. A run
            that time ends depends on the machine's speed.
        max_length: longer texts are cut to so many tokens, or to what tokenizer and positions allow; a pair's two texts
            together.
        batch: rows of one update, of all processes together.
        micro_batch: rows of one forward pass of one process; None: its whole share of the batch. The embeddings of a
            batch are compared with each other whatever it is.
        head: "auto" goes on with the classification head that a checkpoint has, "new" draws one for the data's labels.
        pooling: how "embed" makes an embedding of a text's tokens: "mean", "cls", "max", "mean_sqrt_len_tokens",
            "weightedmean" or "lasttoken"; None: as the model's directory says, else the mean.
        temperature: that "embed" divides cosines by.
        metric: chooses the best state: "accuracy", "macro_f1" or "matthews" of labels, "pearson" or "spearman" of
            numbers, "mrr_at_10" or "recall_at_10" of embeddings; None: the first of these.
        lr: peak learning rate of all that the next five do not name.
        lr_projection, lr_tables, lr_other: of the converted FFNs' hashing, of their tables, of what else they hold;
            None: lr.
        lr_head, lr_backbone: of the classification head, and of the rest of the model; None: lr; 0 leaves it as it is.
        warmup: part of the budget over which the rates rise from zero.
        decay: how they fall from there: "linear", "cosine", or "constant" (not at all).
        final: share of the peak that they fall to.
        weight_decay: of matrices and tables; vectors do not decay.
        decay_tables: whether tables decay, too.
        beta1, beta2, eps: of Adam.
        clip: largest gradient norm of the whole model; 0 does not clip.
        refit_steps: steps between two fits of what layers derive from their own weights (a HireFFN's low-rank sketch).
        optimizer: "adamw", or "lazy-adam": gradients of trees hold the visited rows alone, and only those are stepped.
        precision: "fp32", or "bf16" (matrix products in bfloat16, weights in float32).
        seed: of a new head, the order of the rows, dropout and the resampling of the test's interval.
        validation_share: share of the rows that is held out, by the hash of their texts, where none are given.
        validation_rows: at most so many are measured at a time; None: all.
        validate_steps: steps between two measurements; 0: once an epoch. One is always made at the end.
        log_steps: steps between two rows of the log, which hold means over them.
        log_seconds: time between two lines of progress where no bar is shown.
        checkpoint_seconds: time between two checkpoints; one is also written at every best state, at the end and on
            Ctrl-C.
        checkpoint_steps: also one every so many steps; 0: by time alone.
        tensorboard: also log for TensorBoard, which has to be installed.
    """

    task: Task = "classify"
    text: str | None = None
    text2: str | None = None
    label: str | None = None
    epochs: float | None = None
    max_length: int = 256
    head: Head = "auto"
    pooling: str | None = None
    temperature: float = 0.05
    metric: str | None = None
    lr: float = 5e-5
    lr_head: float | None = None
    lr_backbone: float | None = None
    warmup: float = 0.1
    beta2: float = 0.999
    eps: float = 1e-8
    validation_share: float = 0.1
    validation_rows: int | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, name) is None for name in BUDGETS):
            object.__setattr__(self, "epochs", EPOCHS)  # a frozen dataclass has no other way to fill a default
        check_options(self, "finetune", _RANGES, _CHOICES)
        for name in ("text", "text2", "label"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"finetune: {name} must be the name of a field, got {name}={value!r}")
        if self.pooling is not None and self.pooling not in MODES:
            raise ConfigError(f"finetune: pooling must be one of {', '.join(MODES)}, got {self.pooling!r}")
        if self.pooling is not None and self.task != "embed":
            raise ConfigError(f'finetune: pooling is for task="embed", got task={self.task!r}')
        if self.metric is not None and self.metric not in METRICS[self.task]:
            raise ConfigError(
                f"finetune: the metrics of task={self.task!r} are {', '.join(METRICS[self.task])}, got {self.metric!r}"
            )
        if self.task == "classify" and self.text2 is not None:
            raise ConfigError(f'finetune: text2={self.text2!r} names a second text, which task="pairs" reads')
        if self.task == "embed" and self.label is not None:
            raise ConfigError(f'finetune: label={self.label!r}, and task="embed" has no labels')

    @property
    def chosen_metric(self) -> str:
        """The metric that chooses the best state."""
        return self.metric or METRICS[self.task][0]


BUDGETS = ("epochs", "tokens", "steps", "max_seconds")
_CHOICES: dict[str, tuple[str, ...]] = {"task": get_args(Task), "head": get_args(Head)}
_RANGES = (
    ("epochs", 1e-9, LARGE),
    ("max_length", 4, LARGE),
    ("temperature", 1e-4, 100),
    ("lr_head", 0, LARGE),
    ("lr_backbone", 0, LARGE),
    ("validation_rows", 1, LARGE),
)


def finetune_options(**given: Any) -> FinetuneOptions:
    """Return the options with these choices.

    Raises:
        ConfigError: no such option, a value out of range, or choices that do not go together.
    """
    refuse_unknown(FinetuneOptions, given, "finetune")
    return FinetuneOptions(**given)
