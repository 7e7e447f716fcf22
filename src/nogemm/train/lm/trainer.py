"""The trainer of language models: contexts in, the loss of the guessed tokens out.

Legend: S contexts, L positions, V vocabulary, T guessed tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments

from nogemm.heads import output_embeddings
from nogemm.train.lm.contexts import IGNORED
from nogemm.train.lm.corpus import Corpus
from nogemm.train.lm.run import Run
from nogemm.train.loop.trainer import LoopTrainer
from nogemm.train.loop.updates import agreed
from nogemm.train.optim import settle


class LanguageTrainer(LoopTrainer):
    """Trains a masked or a causal language model; made by `train_model`.

        loss = mean over the guessed tokens of -log softmax(logits)[token] + what layers attach

    Args:
        model: in the form that `make_model` gives it.
        arguments: Trainer's, of `arguments_for`.
        run: counters, log and checkpoints of this run.
        corpus: what is read.
    """

    def __init__(self, model: nn.Module, arguments: TrainingArguments, run: Run, corpus: Corpus) -> None:
        self.corpus = corpus
        super().__init__(model, arguments, run)

    def micro_batch(self, step: int, part: int) -> dict[str, Any]:
        """Return this process's contexts of one part of a step."""
        size, parts = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        first = step * self.options.batch + (self.args.process_index * parts + part) * size
        return self.corpus.batch(np.arange(first, first + size))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the mean cross-entropy of the guessed tokens."""
        labels_SL = inputs["labels"]
        total, count = guessed_loss(model, self.inner, inputs["input_ids"], labels_SL)
        return total / count

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Measure the mean loss on the held-out contexts, shared by all processes."""
        settle(self.inner_optimiser)
        self.inner.eval()
        held_out = self.corpus.validation
        mine = np.arange(self.args.process_index, held_out.count, self.args.world_size)
        size = self.args.per_device_train_batch_size
        total, count = 0.0, 0.0
        for start in range(0, len(mine), size):
            inputs: Any = self._prepare_inputs(self.corpus.held_out(mine[start : start + size]))
            with self.compute_loss_context_manager():
                part, guessed = guessed_loss(self.inner, self.inner, inputs["input_ids"], inputs["labels"])
            total, count = total + float(part), count + guessed
        self.inner.train()
        total, count = agreed([total, count], self.args.device)
        return total / count


def guessed_loss(model: nn.Module, inner: nn.Module, ids_SL: Tensor, labels_SL: Tensor) -> tuple[Tensor, int]:
    """Return the summed cross-entropy of the guessed tokens, and how many they are.

    Only their states reach the head: of a masked language model that is a seventh of its logits.

    Args:
        model: as it is called, perhaps wrapped.
        inner: the transformers model in it.
    """
    keep_SL = labels_SL != IGNORED
    head = output_embeddings(inner)
    chosen: list[bool] = []

    def choose(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if args[0].shape[:-1] != keep_SL.shape:
            return args
        chosen.append(True)
        return (args[0][keep_SL], *args[1:])

    hook = head.register_forward_pre_hook(choose)
    try:
        logits = model(input_ids=ids_SL).logits
    finally:
        hook.remove()
    if not chosen:
        logits = logits[keep_SL]
    labels_T = labels_SL[keep_SL]
    return F.cross_entropy(logits.float(), labels_T, reduction="sum"), len(labels_T)
