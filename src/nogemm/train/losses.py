"""Losses of distillation: errors per dimension in units of the target's spread, embeddings, logits.

Legend: N tokens, D width, S sequences, L positions, V classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nogemm.errors import ConfigError

FLOOR = 1e-2
"""Dimensions that hardly vary count as if they had this share of the median variance: noise must not dominate."""


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

    def state(self) -> dict[str, Tensor]:
        """Return the running sums, to be stored with a checkpoint."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over sums that `state` returned."""
        self.count, self.mean, self.square = state["count"], state["mean"], state["square"]


def relative_error(output_ND: Tensor, target_ND: Tensor, weights_D: Tensor) -> Tensor:
    """Mean over tokens and dimensions of (y - t)^2 / var(t): 1 for a constant guess, 0 for a perfect fit."""
    return ((output_ND - target_ND).square() * weights_D).mean()


def pooled(hidden_SLD: Tensor, mask_SL: Tensor) -> Tensor:
    """Return the mean of the hidden states over the mask, scaled to length one: [S, D]."""
    mask = mask_SL.unsqueeze(-1).to(hidden_SLD.dtype)
    return F.normalize((hidden_SLD * mask).sum(1) / mask.sum(1), dim=-1)


def embedding_loss(hidden_SLD: Tensor, target_SLD: Tensor, mask_SL: Tensor) -> Tensor:
    """Mean over sequences of 1 - cosine between the pooled embeddings."""
    return 1.0 - (pooled(hidden_SLD, mask_SL) * pooled(target_SLD, mask_SL)).sum(-1).mean()


def logits_loss(logits: Tensor, target: Tensor, mask_SL: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence from the teacher's distribution, over tokens [S, L, V] or sequences [S, V].

    0 where the mask leaves no token.
    """
    if logits.dim() == 3 and logits.shape[:2] == mask_SL.shape:
        logits, target = logits[mask_SL.bool()], target[mask_SL.bool()]
    if not logits.numel():
        return logits.sum()
    student = F.log_softmax(logits.float(), dim=-1)
    teacher = F.log_softmax(target.float(), dim=-1)
    return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def output_kind(output: Any, wanted: str) -> str:
    """Resolve "auto": logits where the model's output has them, the pooled embedding otherwise; "mlm" is of logits."""
    has_logits = getattr(output, "logits", None) is not None
    if wanted in ("mlm", "logits") and not has_logits:
        raise ConfigError(f'distil: output="{wanted}" needs a model with a head that gives logits')
    if wanted == "auto":
        return "logits" if has_logits else "embedding"
    return "logits" if wanted == "mlm" else wanted


def task_loss(kind: str, output: Any, target: Any, mask_SL: Tensor) -> Tensor:
    """Return the loss on the task's output; `kind` comes from `output_kind`."""
    if kind == "logits":
        return logits_loss(output.logits, target.logits, mask_SL)
    if kind == "none":
        return torch.zeros(())
    return embedding_loss(hidden_states(output)[-1], hidden_states(target)[-1], mask_SL)


def hidden_states(output: Any) -> tuple[Tensor, ...]:
    """Return the hidden states of every layer: embeddings first; an encoder-decoder's encoder before its decoder."""
    states = getattr(output, "hidden_states", None)
    if states is None:
        return (*output.encoder_hidden_states, *output.decoder_hidden_states)
    return tuple(states)
