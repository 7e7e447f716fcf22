"""Agreement with the teacher on held-out texts, measured while a run goes on, and when to stop early."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nogemm.models.pooling import MEAN, Pooling, pooled
from nogemm.train.data import Batch, Batches, TokenFile
from nogemm.train.losses import hidden_states
from nogemm.train.options import DistilOptions
from nogemm.train.stages import run

VALIDATION_TOKENS = 20_000
"""At most about this many validation tokens are measured at a time."""


class Validation:
    """Held-out texts in batches, and the teacher's embeddings of them, computed when first asked for."""

    def __init__(
        self, teacher: nn.Module, file: TokenFile, batch_tokens: int, pad_id: int, pooling: Pooling = MEAN
    ) -> None:
        self.teacher = teacher
        self.pooling = pooling
        self.batches: list[Batch] = []
        self.targets: list[Tensor] = []
        source = Batches(file, batch_tokens=batch_tokens, seed=0, pad_id=pad_id)
        while source.position.epoch == 0:
            self.batches.append(next(source))

    @torch.no_grad()
    def agreement(self, model: nn.Module) -> float:
        """Return the mean cosine of the texts' pooled embeddings with the teacher's."""
        if not self.targets:
            self.targets = [self._embed(self.teacher, batch) for batch in self.batches]
        pairs = zip(self.batches, self.targets, strict=True)
        return torch.cat([(self._embed(model, batch) * target).sum(-1) for batch, target in pairs]).mean().item()

    def _embed(self, model: nn.Module, batch: Batch) -> Tensor:
        return pooled(hidden_states(run(model, batch, hidden=True))[-1], batch.mask, self.pooling)


def reason_to_stop(agreements: Sequence[float], options: DistilOptions) -> str:
    """Return "target" or "patience" if the measurements so far end the run, else ""."""
    since_best = len(agreements) - 1 - agreements.index(max(agreements))
    if options.target is not None and agreements[-1] >= options.target:
        return "target"
    return "patience" if options.patience and since_best >= options.patience else ""
