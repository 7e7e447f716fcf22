"""transformers' Trainer with our own optimiser, schedule, checkpoints and stopping.

What Trainer and accelerate do: place the model on its device, wrap it for several processes, cast for bfloat16, walk
over micro-batches. What is our own, and why:

- Updates. A loss that a layer attaches to its output (`attach_loss`) enters the backward pass as it is, so gradients
  are divided by the number of micro-batches, not losses. Gradients of rows are averaged by rows (`average_rows`).
- Randomness. Every step draws from a seed of its own, so a resumed run needs no generator's state.
- Data. Each process makes its share of the numbered contexts; nothing has to be skipped when a run is resumed.
- Checkpoints. Trainer's are pickles, and are not renamed into place; ours are those of `distil`.

Legend: S contexts, L positions, V vocabulary, T guessed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nogemm.heads import output_embeddings
from nogemm.train.data import hash_words
from nogemm.train.lm.contexts import IGNORED
from nogemm.train.lm.corpus import Corpus
from nogemm.train.lm.run import Run
from nogemm.train.lm.updates import (
    Watch,
    agreed,
    average_rows,
    clip,
    make_groups,
    make_updater,
    rate_share,
    row_sparse_parameters,
    scale,
)
from nogemm.train.optim import load_optimiser_tensors, set_rates, settle

ENDLESS = 10**9  # steps of a run that time alone ends
WAIT_SECONDS = 86_400  # that a process waits for the first one, which tokenises the data


class LanguageTrainer(Trainer):
    """Trains a masked or a causal language model; made by `train_model`.

        loss = mean over the guessed tokens of -log softmax(logits)[token] + what layers attach

    Args:
        model: in the form that `make_model` gives it.
        arguments: Trainer's, of `arguments_for`.
        run: counters, log and checkpoints of this run.
        corpus: what is read.
    """

    def __init__(self, model: nn.Module, arguments: TrainingArguments, run: Run, corpus: Corpus) -> None:
        self.run, self.corpus, self.options = run, corpus, run.options
        self.inner = model
        self.groups = make_groups(model, self.options)
        self.watch = Watch()
        self.by_rows = row_sparse_parameters(model)
        self.step_loss = torch.zeros((), device=arguments.device)
        if self.by_rows and arguments.world_size > 1:
            # DDP would want dense gradients of them; it leaves them to `average_rows`.
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, self.by_rows)
        super().__init__(model=model, args=arguments, callbacks=[_Steps(self)])
        self.remove_callback(PrinterCallback)  # a library does not print
        if self.by_rows and arguments.world_size > 1:
            for name in self.by_rows:
                dist.broadcast(model.get_parameter(name).data, 0)

    # -- what Trainer asks for

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's micro-batches from the run's step on."""
        return DataLoader(_Micro(self), batch_size=None)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser, which looks at the gradients before every step."""
        if self.optimizer is None:
            self.optimizer = make_updater(self.groups, self.options)
            self.optimizer.register_step_pre_hook(lambda *_: self.before_update())
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make a schedule that does nothing: rates follow the used part of the budget, set before every update."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: what a step costs is counted once, by `flops_per_token`."""
        return 0

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        """Leave the norm to `before_update`: Trainer's does not know gradients of rows."""

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args, **kwargs)
        self.state.global_step = self.run.step
        return found

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._prepare_for_training(*args, **kwargs)
        moments = self.run.take_optimiser()
        if moments is not None:
            load_optimiser_tensors(self.inner_optimiser, moments)
        return found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the gradients of a micro-batch."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        seed = hash_words(self.options.seed, self.state.global_step, inputs.pop("part"), self.args.process_index)
        torch.manual_seed(seed)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        self.step_loss += loss.detach() / self.args.gradient_accumulation_steps
        return loss.detach()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the mean cross-entropy of the guessed tokens."""
        labels_SL = inputs["labels"]
        total, count = guessed_loss(model, self.inner, inputs["input_ids"], labels_SL)
        return total / count

    # -- updates

    def ready(self) -> None:
        """Make the optimiser of a run that has no step left, so that its rows can be settled."""
        if self.optimizer is None:
            moments = self.run.take_optimiser()
            load_optimiser_tensors(self.create_optimizer(), moments or {})

    @property
    def inner_optimiser(self) -> torch.optim.Optimizer:
        """The optimiser without accelerate's wrapper."""
        found: Any = self.optimizer
        return getattr(found, "optimizer", found)

    def before_update(self) -> None:
        """Average, check and clip the gradients, and set the rates."""
        parts = self.args.gradient_accumulation_steps
        if parts > 1:
            scale(self.groups, 1.0 / parts)
        world = self.args.world_size
        if world > 1:
            for name in self.by_rows:
                average_rows(self.inner.get_parameter(name))
        # One exchange for the loss, for whether somebody wants to stop, and for the first process's clock.
        first = self.args.process_index == 0
        loss, stop, seconds = agreed(
            [float(self.step_loss), float(self.run.stop_asked()), self.run.seconds() if first else 0.0],
            self.args.device,
        )
        loss /= world
        self.step_loss.zero_()
        norms = self.watch.norms(self.groups)
        if not all(math.isfinite(value) for value in (loss, *norms.values())):
            raise self.run.told(self.watch.complaint(norms, loss, self.state.global_step, self.groups))
        norm = clip(self.groups, norms, self.options.clip)
        self.watch.accept(norms)
        share = rate_share(self.run.fraction(seconds), self.options)
        set_rates(self.inner_optimiser, {name: self.options.rate(name) for name in self.groups}, share)
        self.run.note_update(loss, norm, share * self.options.lr, stop > 0, seconds)

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


class _Micro(IterableDataset[dict[str, Any]]):
    """This process's micro-batches of every step from the run's on."""

    def __init__(self, trainer: LanguageTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer = self.trainer
        arguments, batch = trainer.args, trainer.options.batch
        size, parts = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        step = trainer.run.step
        while True:
            first = step * batch + arguments.process_index * size * parts
            for part in range(parts):
                numbers = np.arange(first + part * size, first + (part + 1) * size)
                yield {**trainer.corpus.batch(numbers), "part": part}
            step += 1


class _Steps(TrainerCallback):
    """What follows an update: log, validation, checkpoint, end."""

    def __init__(self, trainer: LanguageTrainer) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        trainer = self.trainer
        row = trainer.run.after_update(trainer)
        if row is not None and args.report_to:
            trainer.log({name: value for name, value in row.items() if name != "step" and value is not None})
        control.should_training_stop = trainer.run.fraction() >= 1.0
        return control


def start_processes(device: str | None, world: int) -> None:
    """Join the other processes, if there are any: over NCCL where each has a GPU, over gloo elsewhere."""
    if world > 1:
        cpu = device == "cpu" or not torch.cuda.is_available()
        backend = "gloo" if cpu else "nccl"
        PartialState(cpu=cpu, backend=backend, timeout=timedelta(seconds=WAIT_SECONDS))


def arguments_for(run: Run, device: str | None, world: int) -> TrainingArguments:
    """Make Trainer's arguments: its own logs, checkpoints and clipping are off."""
    options = run.options
    steps = run.total_steps()
    micro = options.micro_batch or max(1, options.batch // world)
    arguments = TrainingArguments(
        output_dir=str(run.directory),
        max_steps=ENDLESS if steps is None else steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, options.batch // (world * micro)),
        max_grad_norm=0.0,
        bf16=options.precision == "bf16",
        use_cpu=device == "cpu" or not torch.cuda.is_available(),
        ddp_timeout=WAIT_SECONDS,
        seed=options.seed,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=["tensorboard"] if options.tensorboard else [],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are several processes, never torch's DataParallel
    return arguments
