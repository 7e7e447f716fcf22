"""A fine-tuning run: a budget in epochs or tokens, a metric on what is held out, and the best state so far."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nogemm.train import checkpoint as ckpt
from nogemm.train.loop.run import Run
from nogemm.train.task.corpus import Corpus
from nogemm.train.task.metrics import measured
from nogemm.train.task.options import METRICS, FinetuneOptions

BEST = "best-"


class FinetuneRun(Run):
    """Counters, log, checkpoints and the best state of one run of `finetune`; arguments as `Run` takes them.

    The best state lies in a folder of its own until the run ends: `best-00000120/model.safetensors`. A folder that no
    checkpoint names was written by a process that died, and goes with the next checkpoint.
    """

    kind = "finetune"
    others = "nogemm train or nogemm distil"
    corpus: Corpus
    """What is read; known once it is tokenised."""

    def __init__(self, options: FinetuneOptions, directory: Path, start: float, keep: bool, first: bool = True) -> None:
        columns = METRICS[options.task]
        super().__init__(
            options,
            directory,
            start,
            keep,
            first,
            columns if options.task == "embed" else ("validation_loss", *columns),
        )
        self.best: dict[str, float] | None = None
        self.spread = 1.0
        """Variance of the numbers that are trained on."""
        self._tokens = 0
        self._in_memory: dict[str, Tensor] = {}

    @property
    def tokens(self) -> int:
        """Tokens read so far, without padding, of all processes."""
        return self._tokens

    @property
    def epochs(self) -> float:
        """Passes over the data so far."""
        return self.step * self.options.batch / self.corpus.order.epoch_rows

    def total_steps(self) -> int | None:
        """Return how many steps epochs and steps allow; None: tokens or time end the run."""
        options = self.options
        counts = [options.steps]
        rows = self.corpus.order.epoch_rows
        counts += [None if options.epochs is None else max(1, math.ceil(options.epochs * rows / options.batch - 1e-9))]
        known = [count for count in counts if count is not None]
        return min(known) if known else None

    def fraction(self, seconds: float | None = None) -> float:
        """Return which part of the budget is used up."""
        limit = self.options.tokens
        return max(super().fraction(seconds), 0.0 if limit is None else self._tokens / limit)

    def note_update(self, loss: float, norm: float, rate: float, stop: bool, clock: float) -> None:
        """Take note of an update, and of its tokens."""
        self._tokens += int(self.corpus.order.lengths_N[self.corpus.order.rows(self.step)].sum())
        super().note_update(loss, norm, rate, stop, clock)

    def validation_due(self) -> bool:
        """Say whether this step is one behind which a measurement is made: the last of an epoch, if not told else."""
        if self.options.validate_steps:
            return super().validation_due()
        rows, batch = self.corpus.order.epoch_rows, self.options.batch
        return self.step * batch // rows > (self.step - 1) * batch // rows

    # -- the best state

    def measure(self, trainer: Any) -> dict[str, float]:
        """Measure on the validation rows, and keep the state if it is the best so far."""
        answers, targets = trainer.answers("validation")
        found = measured(self.options.task, answers, targets, self.spread)
        self.remember(found)
        value = found[self.options.chosen_metric]
        if self.best is None or value > self.best["value"]:
            self._keep_best(trainer.inner, value)
        return found

    def measured_now(self) -> bool:
        """Say whether the state as it is was measured already."""
        return bool(self.history) and self.history[-1]["step"] == self.step

    def _keep_best(self, model: nn.Module, value: float) -> None:
        self.best = {"step": self.step, "epochs": self.epochs, "value": value}
        self.must_save = True
        if not self.keep:
            self._in_memory = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        elif self.first:
            folder = self._folder(self.step)
            try:
                shutil.rmtree(folder, ignore_errors=True)
                ckpt.write_folder(folder, ckpt.Checkpoint({"model": dict(model.state_dict())}, {"value": value}))
            except (OSError, SafetensorError) as error:
                raise ckpt.unwritten(self.directory, f"no best state of step {self.step}", error) from error

    @torch.no_grad()
    def take_best(self, model: nn.Module) -> None:
        """Give the model the weights of the best state."""
        if self.best is None or self.best["step"] == self.step:
            return
        weights = self._in_memory
        if self.keep:
            weights = ckpt.read_checkpoint(self._folder(int(self.best["step"]))).parts["model"]
        model.load_state_dict(weights)

    def save(self, model: nn.Module, optimiser: torch.optim.Optimizer, finished: dict[str, Any] | None = None) -> None:
        """Write a checkpoint; then remove best states that it does not name, or all of a finished run."""
        super().save(model, optimiser, finished)
        if not (self.keep and self.first):
            return
        named = None if self.best is None or finished is not None else self._folder(int(self.best["step"]))
        for folder in self.directory.glob(f"{BEST}*"):
            if folder != named:
                shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.directory / f"{BEST}{step:08d}"

    # -- resuming

    def extra_state(self) -> dict[str, Any]:
        """Return the tokens so far and which state was best."""
        return {"tokens": self._tokens, "best": self.best}

    def take_state(self, state: dict[str, Any]) -> None:
        """Take over what `extra_state` returned."""
        self._tokens, self.best = state["tokens"], state["best"]
