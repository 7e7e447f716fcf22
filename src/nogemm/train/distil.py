"""Distil a converted model from its dense teacher: layer by layer, then end to end; interruptible and resumable.

Reading order: `distil`, `Run.train`, `Run.save` and `Run.restore`; steps are in `stages.py`, data in `feed.py`.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.fitted import is_random
from nogemm.convert.sites import converted
from nogemm.errors import ConfigError
from nogemm.models.inner import inner_model
from nogemm.models.pooling import pooling_of
from nogemm.train import checkpoint as ckpt
from nogemm.train.data import Batch
from nogemm.train.errors import TrainingError, TrainingInterrupted
from nogemm.train.feed import Feed, open_feed
from nogemm.train.guards import changed_options, evaluation_mode, gradients_for, interrupts, sparse_rows
from nogemm.train.losses import Spread
from nogemm.train.memory import keep_freed_memory
from nogemm.train.optim import load_optimiser_tensors, make_optimiser, optimiser_tensors, rate_factor, set_rates, settle
from nogemm.train.options import DistilOptions, DistilReport, StageReport
from nogemm.train.progress import Progress, logger
from nogemm.train.sources import describe
from nogemm.train.stages import LayerStage, ModelStage, Stage, fittable
from nogemm.train.validation import reason_to_stop


def distil(
    model: nn.Module,
    teacher: nn.Module,
    data: str | Path | Iterable[Any] = "sample",
    *,
    tokenizer: Any = None,
    validation: str | Path | Iterable[Any] | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    bar: bool | None = None,
    options: DistilOptions | None = None,
    **changes: Any,
) -> DistilReport:
    """Train the converted FFNs of `model` to reproduce `teacher`, in place.

    Stage 1 fits every new layer to the teacher's FFN of the same name, from one teacher pass per batch; stage 2 trains
    the whole model on the teacher's hidden states and task output. `DistilOptions` holds every choice and its default.
    Embeddings are pooled as the teacher's `modules.json` says, else the model's, else by the mean.

    Args:
        model: a transformers model after `nogemm.convert` (or a smaller one with the teacher's interface). Its
            converted layers are marked as distilled at the end, so that packing and saving no longer warn.
        teacher: the dense model; never changed.
        data: "sample", a text or JSONL file, a `datasets` dataset, or an iterable of texts; see `train.sources.texts`.
        tokenizer: the models' tokenizer; by default the one saved with the teacher.
        validation: texts to measure agreement on; the validation split when `data` is "sample".
        output_dir: where tokens and checkpoints go; without it nothing can be resumed.
        resume: continue from the last checkpoint in `output_dir`, if there is one. A finished run does nothing more
            and gives its report again.
        bar: show a progress bar; by default on a terminal.
        options, changes: `DistilOptions`, or single fields of it as keywords.
    Returns:
        DistilReport: tokens, seconds, losses of every stage, agreement before and after.
    Raises:
        TrainingError: a loss or gradient is not finite (the last checkpoint stays), a directory in use, or one that
            holds an earlier run without `resume`.
        TrainingInterrupted: Ctrl-C or SIGTERM; the state was saved, and the message says how to resume.
        DataError: no text, an unreadable file, or data or a tokenizer that changed since the run that is resumed.
    Example:
        >>> report = nogemm.distil(model, teacher, "sample", tokens=1_000_000, output_dir="run")  # doctest: +SKIP
    """
    options = replace(options or DistilOptions(), **changes)
    random = [name for name, layer in converted(teacher).items() if is_random(layer)]
    if random:
        raise ConfigError(f"teacher: its converted FFNs are still random: {', '.join(random)}; give the dense model")
    start = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="nogemm-")) if output_dir is None else None
    directory = Path(output_dir) if output_dir is not None else scratch
    assert directory is not None
    try:
        told = ckpt.room_is_told(directory, "distil")
        with ckpt.Lock(directory), told, evaluation_mode(model, teacher), keep_freed_memory():
            if not resume:
                ckpt.refuse_earlier_run(directory)
            pooling = pooling_of(teacher, model)
            feed = open_feed(inner_model(teacher), options, directory, data, validation, tokenizer, resume, pooling)
            job = Run(model, teacher, options, feed, directory, start, keep=scratch is None)
            if resume and scratch is None:
                job.restore()
            with Progress(options.log_seconds, bar) as progress, interrupts() as stop:
                job.train(progress, stop)
            return job.finish(describe(data))
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


class Run:
    """One run: models, data, counters, and where it is saved."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        options: DistilOptions,
        feed: Feed,
        directory: Path,
        start: float,
        keep: bool,
    ) -> None:
        self.model, self.teacher = inner_model(model), inner_model(teacher)
        self.options, self.feed, self.directory, self.keep = options, feed, directory, keep
        self.start = start
        self.tokens = 0
        self.stopped = ""
        self.history: list[dict[str, float]] = []
        self.resumed: ckpt.Checkpoint | None = None
        self.plan = self._plan()
        self.reports = [StageReport(stage) for stage, _, _ in self.plan]

    def _plan(self) -> list[tuple[str, float, float]]:
        """Return (stage, from, to) in parts of the budget; a model without sites to fit has only the second."""
        share = self.options.stage1_share
        if not fittable(self.model, self.teacher):
            share = 0.0
        stages = [("layers", 0.0, share), ("model", share, 1.0)]
        return [entry for entry in stages if entry[2] > entry[1]]

    # -- time and budget

    def seconds(self) -> float:
        """Return how long the run has lasted, earlier sessions included."""
        return time.monotonic() - self.start

    def fraction(self) -> float:
        """Return which part of the budget is used up."""
        by_tokens = self.tokens / self.options.tokens if self.options.tokens is not None else 0.0
        by_time = self.seconds() / max(self.options.max_seconds, 1e-9) if self.options.max_seconds is not None else 0.0
        return max(by_tokens, by_time)

    # -- training

    def train(self, progress: Progress, stop: threading.Event) -> None:
        """Run the stages that are not finished yet."""
        progress.begin(self.fraction(), self.tokens)
        first = 0 if self.resumed is None else int(self.resumed.state["stage"])
        for index in range(first, len(self.plan)):
            if not self.stopped or self._inside(index):
                self._train_stage(index, progress, stop)
                self.save(index + 1)

    def _inside(self, index: int) -> bool:
        """Say whether the checkpoint that the run goes on from lies within this stage."""
        state = None if self.resumed is None else self.resumed.state
        return state is not None and state["stage"] == index and not state["between"]

    def _train_stage(self, index: int, progress: Progress, stop: threading.Event) -> None:
        name, low, high = self.plan[index]
        stage: Stage
        if name == "layers":
            stage = LayerStage(self.model, self.teacher, self.options)
        else:
            stage = ModelStage(self.model, self.teacher, self.options, self.feed.masking, self.feed.pooling)
        # A model without a first stage learns its new layers in the second, at their full rates.
        factor = self.options.stage2_rate if low > 0 else 1.0
        optimiser, rates = make_optimiser(stage.groups, self.options, factor)
        if self.resumed is not None and self._inside(index):
            load_optimiser_tensors(optimiser, self.resumed.parts["optimiser"])
            if isinstance(stage, LayerStage):
                stage.fresh.clear()
            for key, state in ckpt.unflatten(self.resumed.parts["spread"]).items():
                stage.spreads.setdefault(key, Spread(0)).load_state(state)
        report = self.reports[index]
        saved = begun = time.monotonic()
        seconds_before = report.seconds
        with gradients_for(stage.groups, self.model), sparse_rows(self.model, self.options.optimizer == "lazy-adam"):
            while self.fraction() < high and not self.stopped:
                part = (self.fraction() - low) / (high - low)
                set_rates(optimiser, rates, rate_factor(part, self.options.warmup))
                losses = self._step(stage, optimiser, next(self.feed.batches))
                report.add(losses, seconds_before + time.monotonic() - begun, self.tokens)
                progress.update(name, min(self.fraction(), 1.0), self.tokens, losses["loss"])
                self._validate_when_due(optimiser)
                due = time.monotonic() - saved >= self.options.checkpoint_seconds
                if stop.is_set() or due:
                    self.save(index, (optimiser, stage))
                    saved = time.monotonic()
                if stop.is_set():
                    settle(optimiser)  # not before saving: a resumed run goes on as if nobody had looked
                    raise TrainingInterrupted(self._how_to_resume())
        settle(optimiser)
        if isinstance(stage, ModelStage):
            stage.refuse_silence()
        if isinstance(stage, LayerStage) and self.options.solve_tokens:
            taken = self.feed.take(self.options.solve_tokens)
            self.tokens += sum(batch.tokens for batch in taken)
            report.last |= stage.solve(taken)
        self.resumed = None

    def _step(self, stage: Stage, optimiser: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
        mean: dict[str, float] = {}
        try:
            for count, losses in enumerate(stage.steps(batch), start=1):
                mean = {
                    name: mean.get(name, 0.0) + (value - mean.get(name, 0.0)) / count for name, value in losses.items()
                }
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
        except TrainingError as error:
            # The parameters are still those of the update before: only a finite gradient is ever applied.
            kept = ckpt.latest(self.directory) if self.keep else None
            where = f"; the last checkpoint is {kept}" if kept else ""
            raise type(error)(f"stopped after {self.tokens:,} tokens: {error}{where}") from error
        self.tokens += batch.tokens
        return mean

    def _validate_when_due(self, optimiser: torch.optim.Optimizer) -> None:
        """Measure agreement every `validate_tokens` tokens; stop at the target, or when it no longer rises."""
        options = self.options
        measured = int(self.history[-1]["tokens"]) if self.history else 0
        due = options.validate_tokens and self.tokens >= measured + options.validate_tokens
        if self.feed.validation is None or not due:
            return
        settle(optimiser)
        value = self.feed.validation.agreement(self.model)
        self.history.append({"tokens": self.tokens, "seconds": self.seconds(), "agreement": value})
        logger.info("agreement on the validation texts after %s tokens: %.4f", f"{self.tokens:,}", value)
        self.stopped = reason_to_stop([entry["agreement"] for entry in self.history], options)

    # -- saving

    def save(
        self,
        index: int,
        inside: tuple[torch.optim.Optimizer, Stage] | None = None,
        finished: dict[str, Any] | None = None,
    ) -> None:
        """Write everything that a resumed run needs.

        Args:
            index: of the stage to go on with; the number of stages when all have ended.
            inside: the optimiser and the stage if it has begun.
            finished: {"seconds", "agreement"} of the report, once the run has ended.
        """
        if not self.keep:
            return
        state = {
            "stage": index,
            "between": inside is None,
            "tokens": self.tokens,
            "seconds": self.seconds(),
            "stopped": self.stopped,
            "position": self.feed.batches.state(),
            "history": self.history,
            "reports": [asdict(report) for report in self.reports],
            "options": self.options.to_dict(),
            "finished": finished,
        }
        parts: dict[str, dict[str, Tensor]] = {"model": self.model.state_dict(), "optimiser": {}, "spread": {}}
        if inside is not None:
            optimiser, stage = inside
            parts["optimiser"] = optimiser_tensors(optimiser)
            parts["spread"] = ckpt.flatten({name: spread.state() for name, spread in stage.spreads.items()})
        ckpt.write_checkpoint(self.directory, sum(r.steps for r in self.reports), ckpt.Checkpoint(parts, state))

    def restore(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        path = ckpt.latest(self.directory)
        if path is None:
            return
        self.resumed = ckpt.read_checkpoint(path)
        state = self.resumed.state
        # Absent from checkpoints of versions that wrote none at the end of a stage.
        for name, value in (("between", False), ("stopped", ""), ("finished", None)):
            state.setdefault(name, value)
        different = changed_options(state["options"], self.options.to_dict())
        if different:
            raise TrainingError(f"cannot resume {path}: it was started with other options: {'; '.join(different)}")
        try:
            self.model.load_state_dict(self.resumed.parts["model"])
        except RuntimeError as error:
            raise TrainingError(f"cannot resume {path}: it holds another model ({error})") from error
        self.tokens = state["tokens"]
        self.start = time.monotonic() - state["seconds"]
        self.feed.batches.load_state(state["position"])
        self.history = state["history"]
        self.stopped = state["stopped"]
        self.reports = [StageReport(**report) for report in state["reports"]]

    def _how_to_resume(self) -> str:
        if not self.keep:
            return "distil was interrupted; nothing was saved because no output_dir was given"
        return (
            f"distil was interrupted after {self.tokens:,} tokens; its state is in {self.directory}. "
            "Call it again with the same arguments and resume=True (--resume on the command line) to continue"
        )

    def finish(self, data: str) -> DistilReport:
        """Mark the layers as trained, measure agreement, and report."""
        for layer in converted(self.model).values():
            layer.fitted = "distilled"
        ended: dict[str, Any] | None = None if self.resumed is None else self.resumed.state["finished"]
        if ended is None:
            ended = {"seconds": self.seconds(), "agreement": None}
            if self.feed.validation is not None:
                ended["agreement"] = self.feed.validation.agreement(self.model)
            self.save(len(self.plan), finished=ended)
        return DistilReport(
            stages=self.reports,
            tokens=self.tokens,
            seconds=ended["seconds"],
            stopped=self.stopped or "budget",
            agreement=ended["agreement"],
            history=self.history,
            options=self.options.to_dict(),
            data=data,
        )
