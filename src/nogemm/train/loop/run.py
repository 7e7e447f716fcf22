"""One run: how far it is, what it has measured, when it saves, and how it goes on after it was stopped."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from nogemm.errors import NogemmError
from nogemm.train import checkpoint as ckpt
from nogemm.train.errors import TrainingError, TrainingInterrupted
from nogemm.train.guards import changed_options
from nogemm.train.loop.journal import Journal
from nogemm.train.loop.options import FREE, LoopOptions
from nogemm.train.loop.updates import refit
from nogemm.train.optim import optimiser_tensors
from nogemm.train.progress import Progress, logger


class Loop(Protocol):
    """What a run needs of its trainer."""

    model: Any

    @property
    def inner_optimiser(self) -> torch.optim.Optimizer: ...


class Run:
    """Counters, log and checkpoints; a command says what its budget, its tokens and its measurements are.

    Args:
        options: of the run.
        directory: where tokens, log and checkpoints go.
        start: when it began, by time.monotonic().
        keep: whether checkpoints are kept, because the caller named the directory.
        first: whether this is the first of its processes, which alone writes.
        measured: columns of the log that a measurement fills.
    """

    kind: ClassVar[str] = "train"
    others: ClassVar[str] = "nogemm distil"
    """What else writes checkpoints of this form."""

    def __init__(
        self,
        options: LoopOptions,
        directory: Path,
        start: float,
        keep: bool,
        first: bool = True,
        measured: tuple[str, ...] = ("validation_loss",),
    ) -> None:
        self.options: Any = options
        self.directory, self.start, self.keep, self.first = directory, start, keep, first
        self.step = 0
        self.clock = self.saved = 0.0
        self.busy = 0.0
        """Seconds spent in updates: without reading, measuring and saving."""
        self.history: list[dict[str, float]] = []
        self.finished: dict[str, Any] | None = None
        self.journal = Journal(directory if first and keep else None, options.log_steps, measured)
        self.progress: Progress | None = None
        self.stop = threading.Event()
        self.must_save = False
        """Whether something was written that the next checkpoint has to name."""
        self._stopping = False
        self._rate = 0.0
        self._mark = time.monotonic()
        self._window: dict[str, Any] | None = None
        self._weights: dict[str, Tensor] | None = None
        self._moments: dict[str, Tensor] | None = None

    # -- what a command says

    @property
    def tokens(self) -> int:
        """Tokens read so far, of all processes."""
        raise NotImplementedError

    def total_steps(self) -> int | None:
        """Return how many steps the budget allows; None: something else ends the run."""
        raise NotImplementedError

    def measure(self, trainer: Any) -> dict[str, float]:
        """Measure on what is held out; return the log's columns."""
        raise NotImplementedError

    def validation_due(self) -> bool:
        """Say whether this step is one behind which a measurement is made."""
        every = self.options.validate_steps
        return bool(every) and self.step % every == 0

    def extra_state(self) -> dict[str, Any]:
        """Return what a command adds to a checkpoint's state, as JSON values."""
        return {}

    def take_state(self, state: dict[str, Any]) -> None:
        """Take over what `extra_state` returned."""

    # -- how far

    def seconds(self) -> float:
        """Return how long the run has lasted, earlier sessions included."""
        return time.monotonic() - self.start

    def fraction(self, seconds: float | None = None) -> float:
        """Return which part of the budget is used up; `seconds` by the clock that all processes share."""
        clock, limit, steps = self.clock if seconds is None else seconds, self.options.max_seconds, self.total_steps()
        by_time = 0.0 if limit is None else clock / max(limit, 1e-9)
        return max(by_time, 0.0 if steps is None else self.step / steps)

    def stop_asked(self) -> bool:
        """Say whether somebody asked this process to stop."""
        return self.stop.is_set()

    # -- steps

    def begin(self) -> None:
        """Start the log and the clock of this session's steps."""
        self.journal.begin(self.step, self._window)
        self.saved = self.clock = self.seconds()
        self._mark = time.monotonic()
        if self.progress is not None:
            self.progress.begin(self.fraction(), self.tokens)

    def note_update(self, loss: float, norm: float, rate: float, stop: bool, clock: float) -> None:
        """Take note of an update that is about to be made."""
        self.step += 1
        self._rate, self._stopping, self.clock = rate, stop, clock
        self.journal.add(loss, norm)

    def after_update(self, trainer: Loop) -> dict[str, Any] | None:
        """Log, measure, save and stop, as is due; return the log's row if one was written."""
        options = self.options
        self.busy += time.monotonic() - self._mark
        if options.refit_steps and self.step % options.refit_steps == 0:
            refit(trainer.model)
        found = self.measure(trainer) if self.validation_due() else None
        try:
            row = self.journal.row(self.step, self.tokens, self.clock, self._rate, found)
        except OSError as error:
            raise TrainingError(f"the log in {self.directory} cannot be written: {error}. {self._kept()}") from error
        if self.progress is not None and row is not None:
            self.progress.update("training", min(self.fraction(), 1.0), self.tokens, row["loss"])
        by_step = options.checkpoint_steps and self.step % options.checkpoint_steps == 0
        if by_step or self.must_save or self._stopping or self.clock - self.saved >= options.checkpoint_seconds:
            self.save(trainer.model, trainer.inner_optimiser)
        if self._stopping:
            raise TrainingInterrupted(self._how_to_resume())
        self._mark = time.monotonic()
        return row

    def remember(self, found: dict[str, float]) -> None:
        """Add a measurement to the history, and say it."""
        self.history.append({"step": self.step, "tokens": self.tokens, **found})
        if self.first:
            words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in found.items())
            logger.info("after %s tokens: %s", f"{self.tokens:,}", words)

    # -- saving

    def save(self, model: nn.Module, optimiser: torch.optim.Optimizer, finished: dict[str, Any] | None = None) -> None:
        """Write everything that a resumed run needs.

        Raises:
            TrainingError: it cannot be written; the last good checkpoint stays.
        """
        self.saved, self.must_save = self.clock, False
        if not (self.keep and self.first):
            return
        state = {
            "kind": self.kind,
            "step": self.step,
            "seconds": self.seconds(),
            "busy": self.busy,
            "window": self.journal.state(),
            "history": self.history,
            "options": self.options.to_dict(),
            "finished": finished,
            **self.extra_state(),
        }
        parts = {"model": model.state_dict(), "optimiser": optimiser_tensors(optimiser)}
        ckpt.write_checkpoint(self.directory, self.step, ckpt.Checkpoint(parts, state))

    def read(self) -> None:
        """Read the counters of the last checkpoint, if there is one.

        Raises:
            TrainingError: it is of another kind of run, or of other options.
        """
        path = ckpt.latest(self.directory)
        if path is None:
            return
        found = ckpt.read_checkpoint(path)
        state = found.state
        if state.get("kind") != self.kind:
            raise TrainingError(f"cannot resume {path}: it is of another kind of run ({self.others})")
        different = changed_options(state["options"], self.options.to_dict(), FREE)
        if different:
            raise TrainingError(f"cannot resume {path}: it was started with other options: {'; '.join(different)}")
        self.step, self.busy, self.history = state["step"], state["busy"], state["history"]
        self.start = time.monotonic() - state["seconds"]
        self.finished, self._window, self._moments = state["finished"], state["window"], found.parts["optimiser"]
        self._weights = found.parts["model"]
        self.take_state(state)

    def restore(self, model: nn.Module) -> None:
        """Give the model the weights of the checkpoint that was read, if one was.

        Raises:
            TrainingError: they are another model's.
        """
        if self._weights is None:
            return
        try:
            model.load_state_dict(self._weights)
        except RuntimeError as error:
            raise TrainingError(f"cannot resume {self.directory}: it holds another model ({error})") from error
        self._weights = None

    def take_optimiser(self) -> dict[str, Tensor] | None:
        """Return what a restored run knows of its optimiser, once."""
        moments, self._moments = self._moments, None
        return moments

    def told(self, error: NogemmError) -> TrainingError:
        """Return an error that also says what was kept."""
        return TrainingError(f"stopped after {self.tokens:,} tokens: {error}. {self._kept()}".rstrip())

    def _kept(self) -> str:
        return ckpt.kept(self.directory) if self.keep else "No checkpoint was kept before."

    def _how_to_resume(self) -> str:
        if not self.keep:
            return "training was interrupted; nothing was saved because no output_dir was given"
        return (
            f"training was interrupted after {self.tokens:,} tokens; its state is in {self.directory}. "
            "Call it again with the same arguments and resume=True (--resume on the command line) to continue"
        )
