"""A language model's run: a budget in tokens, and the loss on held-out contexts."""

from __future__ import annotations

from typing import Any

from nogemm.train.loop.run import Run as LoopRun


class Run(LoopRun):
    """Counters, log and checkpoints of one run of `train_model`."""

    others = "nogemm distil or nogemm finetune"

    @property
    def tokens(self) -> int:
        """Tokens read so far, of all processes."""
        return self.step * self.options.batch * self.options.context

    def total_steps(self) -> int | None:
        """Return how many steps the budget allows; None: time alone ends the run."""
        options = self.options
        counts = [options.steps]
        counts += [None if options.tokens is None else -(-options.tokens // (options.batch * options.context))]
        known = [count for count in counts if count is not None]
        return min(known) if known else None

    def measure(self, trainer: Any) -> dict[str, float]:
        """Measure the loss on the held-out contexts, and remember it."""
        found = {"validation_loss": trainer.validation_loss()}
        self.remember(found)
        return found
