"""The trainer of labels and numbers: rows in, the loss of their answers out.

Legend: B rows, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainingArguments

from nogemm.errors import NotFiniteError
from nogemm.models.texts import accepted
from nogemm.train.loop.trainer import LoopTrainer
from nogemm.train.loop.updates import agreed_array
from nogemm.train.optim import settle
from nogemm.train.task.corpus import Part
from nogemm.train.task.models import make_groups
from nogemm.train.task.run import FinetuneRun

EVALUATED = 32
"""Rows that are measured at a time, at least; without gradients they take little memory."""


class RowTrainer(LoopTrainer):
    """Deals the rows of every batch to the processes, and measures on the rows of a part.

    Args:
        model: what is trained.
        arguments: Trainer's, of `arguments_for`.
        run: counters, log, checkpoints and rows of this run.
        more: what another base takes.
    """

    caller = "finetune"

    def __init__(self, model: nn.Module, arguments: TrainingArguments, run: FinetuneRun, **more: Any) -> None:
        self.corpus = run.corpus
        super().__init__(model, arguments, run, **more)

    def make_groups(self) -> dict[str, list[nn.Parameter]]:
        """Sort what is trained into the groups that have a rate of their own."""
        return make_groups(self.inner, self.options)

    def micro_rows(self, step: int, part: int) -> np.ndarray:
        """Return this process's rows of one part of a step; every share has rows of all lengths."""
        parts = self.args.gradient_accumulation_steps
        return self.corpus.order.rows(step)[self.args.process_index * parts + part :: parts * self.args.world_size]

    def answers(self, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Return what the model answers to the rows of a part, and their targets.

        Raises:
            TrainingError: an answer is not finite.
        """
        settle(self.inner_optimiser)
        rows = self.corpus.parts[part]
        count = len(rows) if part != "validation" else min(len(rows), self.options.validation_rows or len(rows))
        self.inner.eval()
        with torch.no_grad():
            found = self.answered(rows, count)
        self.inner.train()
        broken = int((~np.isfinite(found)).reshape(count, -1).any(axis=1).sum())
        if broken:
            raise self.run.told(NotFiniteError(f"the answers to {broken} of {count} {part} rows are not finite"))
        targets = np.zeros(count) if rows.targets is None else rows.targets[:count]
        return found, targets

    def answered(self, rows: Part, count: int) -> np.ndarray:
        """Return the answers to the first rows of a part."""
        raise NotImplementedError

    def shared(self, rows: Part, count: int, column: int = 0) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        """Yield this process's batches of the first rows of a part, and the model's inputs for each."""
        mine = np.arange(self.args.process_index, count, self.args.world_size)
        for some in rows.cut(mine, max(EVALUATED, self.args.per_device_train_batch_size), column):
            inputs: Any = self._prepare_inputs(rows.inputs(some, column))
            yield some, inputs

    def gathered(self, found: np.ndarray) -> np.ndarray:
        """Put together what each process has filled in; the rows of the others are zero."""
        return agreed_array(found, self.args.device)


class LabelTrainer(RowTrainer):
    """Trains a model with a head for classes or one number; made by `finetune`.

    loss = mean over rows of -log softmax(logits)[label],  or of (answer - number)^2 / variance of the numbers,
           + what layers attach
    """

    def micro_batch(self, step: int, part: int) -> dict[str, Any]:
        """Return this process's inputs and targets of one part of a step."""
        rows, train = self.micro_rows(step, part), self.corpus.parts["train"]
        assert train.targets is not None
        return {**train.inputs(rows), "targets": torch.from_numpy(train.targets[rows])}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the mean loss of a micro-batch."""
        targets = inputs.pop("targets")
        logits_BC: Tensor = model(**accepted(self.inner, inputs)).logits.float()
        if self.options.task == "regress":
            return F.mse_loss(logits_BC[:, 0], targets) / self.run.spread  # type: ignore[attr-defined]
        return F.cross_entropy(logits_BC, targets)

    def answered(self, rows: Part, count: int) -> np.ndarray:
        """Return logits [N, C], or numbers [N]."""
        out = np.zeros((count, int(self.inner.config.num_labels)), np.float32)  # type: ignore[union-attr]
        for some, inputs in self.shared(rows, count):
            with self.compute_loss_context_manager():
                out[some] = self.inner(**accepted(self.inner, inputs)).logits.float().cpu().numpy()
        found = self.gathered(out)
        return found[:, 0] if self.options.task == "regress" else found
