"""Every choice of a training run, in one frozen dataclass; the presets, which are sets of defaults.

Reading order: `TrainOptions`, `PRESETS`, `train_options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nogemm.config import LayerConfig, layer_config
from nogemm.errors import ConfigError
from nogemm.layers import HireConfig, LookupConfig
from nogemm.train.loop.options import LARGE, LoopOptions, check_options, refuse_unknown

Task = Literal["mlm", "clm"]
Head = Literal["dense", "hire"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions(LoopOptions):
    """What `train_model` trains, how and how long.

    Attributes:
        task: "mlm" (hidden tokens are guessed) or "clm" (the next token is).
        arch: transformers' name of a model type, such as "roberta", "roberta-prelayernorm", "llama" or "gpt2".
        layers, width, heads, hidden: its depth, width, heads of attention, and neurons of a dense FFN (None: 4 width).
        activation: of a dense FFN; None: the architecture's own.
        ffn: what takes the place of every FFN; None leaves them dense.
        head: "hire" also gives a trained causal model the head that proves its token (`convert_head`).
        vocabulary: tokens of a tokenizer that is trained on the data, at least 261.
        tokens, steps, max_seconds: the budget. Whichever is used up first ends the run, and rates reach their end
            there. A run that time ends depends on the machine's speed.
        context: tokens that the model sees at once; texts are packed into contexts without padding.
        batch: contexts of one update, of all processes together.
        micro_batch: contexts of one forward pass of one process; None: its whole share of the batch.
        mask: share of the tokens that "mlm" guesses: of them 80 % are hidden, 10 % replaced, 10 % shown.
        lr: peak learning rate of all that the next three do not name.
        lr_projection, lr_tables, lr_other: of the new layers' hashing, of their tables, of what else they hold; None:
            lr.
        warmup: part of the budget over which the rates rise from zero.
        decay: how they fall from there: "linear", "cosine", or "constant" (not at all).
        final: share of the peak that they fall to.
        weight_decay: of matrices and tables; vectors do not decay.
        decay_tables: whether tables decay, too.
        beta1, beta2, eps: of Adam.
        clip: largest gradient norm of the whole model; 0 does not clip.
        dropout, tie: of a new model, and whether its head is its embeddings; None: the architecture's own.
        refit_steps: steps between two fits of what layers derive from their own weights (a HireFFN's low-rank sketch);
            hash tables of neurons (SLIDE, MONGOOSE) renew themselves.
        optimizer: "adamw", or "lazy-adam": gradients of trees hold the visited rows alone, and only those are stepped.
        precision: "fp32", or "bf16" (matrix products in bfloat16, weights in float32).
        seed: of weights, order of the data, hidden tokens and dropout.
        field: field of JSONL or CSV rows that holds the text; None tries the usual names.
        data_tokens: stop reading the data after so many; None: what the budget can use. A hub's data set, where time
            alone is the budget, is read to 100 million.
        validation_share: share of the texts that is held out, by their hash, where no validation texts are given.
        validation_tokens: at most so many are measured at a time.
        validate_steps: steps between two measurements; 0 measures at the end alone.
        log_steps: steps between two rows of the log, which hold means over them.
        log_seconds: time between two lines of progress where no bar is shown.
        checkpoint_seconds: time between two checkpoints; one is also written at the end and on Ctrl-C.
        checkpoint_steps: also one every so many steps; 0: by time alone.
        tensorboard: also log for TensorBoard, which has to be installed.
    """

    task: Task = "mlm"
    arch: str = "roberta"
    layers: int = 4
    width: int = 512
    heads: int = 8
    hidden: int | None = None
    activation: str | None = None
    ffn: LayerConfig | None = None
    head: Head = "dense"
    vocabulary: int = 8192
    context: int = 128
    mask: float = 0.15
    dropout: float | None = None
    tie: bool | None = None
    field: str | None = None
    data_tokens: int | None = None
    validation_tokens: int = 100_000

    def __post_init__(self) -> None:
        if self.tokens is None and self.steps is None and self.max_seconds is None:
            raise ConfigError("train: a budget is needed: tokens, steps or max_seconds")
        check_options(self, "train", _RANGES, _CHOICES)
        if self.ffn is not None and not isinstance(self.ffn, LayerConfig):
            raise ConfigError(f"train: ffn must be a layer config such as nogemm.LookupConfig(), got {self.ffn!r}")
        if self.width % self.heads:
            raise ConfigError(f"train: width={self.width} is not a multiple of heads={self.heads}")
        if self.head == "hire" and self.task != "clm":
            raise ConfigError('train: head="hire" is for models that generate: task="clm"')

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        return super().to_dict() | {"ffn": None if self.ffn is None else self.ffn.to_dict()}


BUDGETS = ("tokens", "steps", "max_seconds")
OF_NEW_MODELS = ("arch", "layers", "width", "heads", "hidden", "activation", "dropout", "tie")
"""Options that a model from a checkpoint or a config has no use for."""

PRESETS: dict[str, dict[str, Any]] = {
    # LookupFFN (Zeng et al., 2023), its small model: 250,000 updates of 256 x 512 tokens, AdamW on everything. The
    # LayerNorm of the layer is the architecture's own, which stands in front of it.
    "lookupffn": {
        "task": "mlm", "arch": "roberta-prelayernorm", "layers": 4, "width": 512, "heads": 8, "hidden": 2048,
        "ffn": LookupConfig(tables=256, bits=8, norm=False, init="reference"), "vocabulary": 50_265, "steps": 250_000,
        "context": 512, "batch": 256, "mask": 0.15, "lr": 1e-4, "warmup": 0.04, "decay": "linear",
        "weight_decay": 0.01, "decay_tables": True, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "clip": 0.0,
        "dropout": 0.1, "tie": False,
    },
    # HiRE (Yerram et al., 2024): 5 % of the neurons, in groups of eight, and the head. The paper's model has 10^9
    # parameters and its recipe is not published; sizes and rates are those of the smallest GPT-2.
    "hire": {
        "task": "clm", "arch": "llama", "layers": 12, "width": 768, "heads": 12, "hidden": 3072, "activation": "relu",
        "ffn": HireConfig(keep=0.05, group=8), "head": "hire", "vocabulary": 32_000, "tokens": 10_000_000_000,
        "context": 1024, "batch": 512, "lr": 6e-4, "warmup": 0.01, "decay": "cosine", "final": 0.1,
        "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "clip": 1.0, "dropout": 0.0,
    },
    # Two cores, some minutes.
    "laptop": {
        "task": "mlm", "arch": "roberta", "layers": 2, "width": 128, "heads": 4, "hidden": 512, "vocabulary": 4096,
        "tokens": 2_000_000, "context": 64, "batch": 32, "lr": 2e-3, "lr_tables": 5e-3, "warmup": 0.1,
        "decay": "linear", "weight_decay": 0.01, "clip": 1.0, "dropout": 0.0, "validation_tokens": 20_000,
    },
}  # fmt: skip


def train_options(preset: str | None = None, /, **given: Any) -> TrainOptions:
    """Return a preset's options, overridden by what is given; a given budget replaces all budgets of the preset.

    Raises:
        ConfigError: no such preset or option, or a value out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"train: unknown preset {preset!r}; the presets are {', '.join(PRESETS)}")
    refuse_unknown(TrainOptions, given, "train")
    base = {} if preset is None else dict(PRESETS[preset])
    if any(given.get(name) is not None for name in BUDGETS):
        base = {name: value for name, value in base.items() if name not in BUDGETS}
    if isinstance(given.get("ffn"), Mapping):
        given["ffn"] = layer_config(dict(given["ffn"]))
    return TrainOptions(**base | given)


def preset_record(preset: str | None, options: TrainOptions) -> dict[str, Any]:
    """Return what a preset says and where the options differ from it, as JSON values."""
    if preset is None:
        return {"preset": None, "preset_options": {}, "overrides": {}}
    base = train_options(preset).to_dict()
    said = {name: base[name] for name in PRESETS[preset]}
    changed = {name: value for name, value in options.to_dict().items() if value != base[name]}
    return {"preset": preset, "preset_options": said, "overrides": changed}


_CHOICES: dict[str, tuple[str, ...]] = {"task": get_args(Task), "head": get_args(Head)}
_RANGES = (
    *((name, 1, LARGE) for name in ("layers", "width", "heads", "hidden", "data_tokens", "validation_tokens")),
    ("vocabulary", 261, LARGE),
    ("context", 8, LARGE),
    ("mask", 0.001, 0.9),
    ("dropout", 0, 0.99),
)
