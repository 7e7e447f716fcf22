"""Losses of distillation: errors per dimension in units of the target's spread, embeddings, logits.

Legend: N tokens or sequences, D width, S sequences, L positions, V logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nogemm.errors import ConfigError
from nogemm.models.pooling import MEAN, Pooling, pooled

FLOOR = 1e-2
"""Dimensions that hardly vary count as if they had this share of the median variance: noise must not dominate."""
DIFFERENT = 1e-3
"""Share of the largest value by which outputs differ that are not equal up to rounding."""


class Spread:
    """Running mean and variance of every dimension of a target, over all tokens seen so far."""

    def __init__(self, width: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.square = torch.zeros(width, dtype=torch.float64)

    def update(self, target_ND: Tensor) -> None:
        """Take more tokens into account (Chan's parallel update of mean and sum of squared deviations)."""
        count = target_ND.shape[0]
        variance, mean = torch.var_mean(target_ND.float(), dim=0, correction=0)
        delta = mean.double() - self.mean
        total = self.count + count
        self.square += variance.double() * count + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def weights(self) -> Tensor:
        """Return 1 / variance of every dimension, float32 [D]."""
        variance = self.square / self.count.clamp_min(1)
        return (1.0 / variance.clamp_min(FLOOR * float(variance.median()) + 1e-12)).float()

    def number_weights(self) -> Tensor:
        """Return weights for outputs that are numbers, few in a batch: one value's variance must not count as 0."""
        variance = self.square / self.count.clamp_min(1)
        return (1.0 / variance.clamp_min(FLOOR * (variance + self.mean.square())).clamp_min(1e-12)).float()

    def state(self) -> dict[str, Tensor]:
        """Return the running sums, to be stored with a checkpoint."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over sums that `state` returned."""
        self.count, self.mean, self.square = state["count"], state["mean"], state["square"]


def relative_error(output_ND: Tensor, target_ND: Tensor, weights_D: Tensor) -> Tensor:
    """Mean over tokens and dimensions of (y - t)^2 / var(t): 1 for a constant guess, 0 for a perfect fit."""
    return ((output_ND - target_ND).square() * weights_D).mean()


def embedding_loss(hidden_SLD: Tensor, target_SLD: Tensor, mask_SL: Tensor, pooling: Pooling = MEAN) -> Tensor:
    """Mean over sequences of 1 - cosine between the pooled embeddings."""
    ours_SE, theirs_SE = (pooled(states, mask_SL, pooling) for states in (hidden_SLD, target_SLD))
    return 1.0 - (ours_SE * theirs_SE).sum(-1).mean()


def compared(logits: Tensor, mask_SL: Tensor) -> Tensor:
    """Return the logits that count: of the tokens in the mask [N, V] where every token has some, else all [S, V]."""
    return logits[mask_SL.bool()] if logits.dim() == 3 and logits.shape[:2] == mask_SL.shape else logits


def class_loss(logits_NV: Tensor, target_NV: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence from the teacher's distribution over classes; 0 of no rows."""
    if not logits_NV.numel():
        return logits_NV.sum()
    student = F.log_softmax(logits_NV.float(), dim=-1)
    teacher = F.log_softmax(target_NV.float(), dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def label_loss(logits_NV: Tensor, target_NV: Tensor) -> Tensor:
    """Binary cross-entropy against the teacher's sigmoids less their own entropy, summed over labels, mean over rows.

    That is the Kullback-Leibler divergence of independent yes-or-no labels: 0 for a perfect fit, as in `class_loss`.
    """
    if not logits_NV.numel():
        return logits_NV.sum()
    student, teacher = logits_NV.float(), target_NV.float()
    yes = F.logsigmoid(teacher) - F.logsigmoid(student)
    no = F.logsigmoid(-teacher) - F.logsigmoid(-student)
    return (teacher.sigmoid() * yes + (-teacher).sigmoid() * no).sum(-1).mean()


def number_loss(logits_NV: Tensor, target_NV: Tensor, spread: Spread) -> Tensor:
    """Squared error in units of the teacher's variance, which `spread` first learns from this target."""
    if not logits_NV.numel():
        return logits_NV.sum()
    rows = target_NV.float().reshape(-1, target_NV.shape[-1])
    spread.update(rows)
    return relative_error(logits_NV.float().reshape(rows.shape), rows, spread.number_weights())


def output_kind(output: Any, wanted: str, config: Any = None) -> str:
    """Say what is compared: "embedding", "none", or what the logits are, "classes", "labels" or "numbers".

    "auto" takes the logits where the model's output has them, the pooled embedding otherwise. Logits are labels behind
    a sigmoid if the config says so (`problem_type`, or sentence-transformers' activation of a cross-encoder), numbers
    if it says regression or there is one alone, and classes of one softmax otherwise: a softmax over one logit is 1
    whatever the model answers.
    """
    logits = getattr(output, "logits", None)
    if wanted in ("mlm", "logits") and logits is None:
        raise ConfigError(f'distil: output="{wanted}" needs a model with a head that gives logits')
    if wanted in ("embedding", "none") or logits is None:
        return "embedding" if wanted == "auto" else wanted
    if logits.dim() == 2:  # a head on the whole text, which these settings are about
        known = getattr(config, "sentence_transformers", None) or {}
        activation = known.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None)
        problem = getattr(config, "problem_type", None)
        if str(activation).endswith("Sigmoid") or (activation is None and problem == "multi_label_classification"):
            return "labels"
        if problem == "regression":
            return "numbers"
    return "numbers" if logits.shape[-1] == 1 else "classes"


def task_loss(
    kind: str, output: Any, target: Any, mask_SL: Tensor, spreads: dict[str, Spread], pooling: Pooling = MEAN
) -> Tensor:
    """Return the loss on the task's output.

    `kind` comes from `output_kind`, `spreads` keeps that of numbers, `pooling` makes the embeddings.
    """
    if kind == "none":
        return torch.zeros(())
    if kind == "embedding":
        return embedding_loss(hidden_states(output)[-1], hidden_states(target)[-1], mask_SL, pooling)
    logits, goal = compared(output.logits, mask_SL), compared(target.logits, mask_SL)
    if kind == "numbers":
        return number_loss(logits, goal, spreads.setdefault("output", Spread(logits.shape[-1])))
    return label_loss(logits, goal) if kind == "labels" else class_loss(logits, goal)


def outputs_differ(kind: str, output: Any, target: Any, mask_SL: Tensor, pooling: Pooling = MEAN) -> bool:
    """Say whether what `task_loss` compares differs by more than rounding."""
    if kind == "none":
        return False
    if kind == "embedding":
        ours, theirs = (pooled(hidden_states(found)[-1], mask_SL, pooling) for found in (output, target))
    else:
        ours, theirs = compared(output.logits, mask_SL), compared(target.logits, mask_SL)
    return bool(ours.numel()) and bool((ours - theirs).abs().max() > DIFFERENT * theirs.abs().max())


def hidden_states(output: Any) -> tuple[Tensor, ...]:
    """Return the hidden states of every layer: embeddings first; an encoder-decoder's encoder before its decoder."""
    states = getattr(output, "hidden_states", None)
    if states is None:
        return (*output.encoder_hidden_states, *output.decoder_hidden_states)
    return tuple(states)
