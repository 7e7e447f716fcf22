"""transformers' Trainer with our own optimiser, schedule, checkpoints and stopping.

What Trainer and accelerate do: place the model on its device, wrap it for several processes, cast for bfloat16, walk
over micro-batches. What is our own, and why:

- Updates. A loss that a layer attaches to its output (`attach_loss`) enters the backward pass as it is, so gradients
  are divided by the number of micro-batches, not losses. Gradients of rows are averaged by rows (`average_rows`).
- Randomness. Every step draws from a seed of its own, so a resumed run needs no generator's state.
- Data. Each process makes its share of the numbered rows; nothing has to be skipped when a run is resumed.
- Checkpoints. Trainer's are pickles, and are not renamed into place; ours are those of `distil`.

A command's trainer says what a micro-batch holds (`micro_batch`) and what its loss is (`compute_loss`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nogemm.train.data import hash_words
from nogemm.train.loop.run import Run
from nogemm.train.loop.updates import (
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
from nogemm.train.optim import load_optimiser_tensors, set_rates

ENDLESS = 10**9  # steps of a run that something else than steps ends
WAIT_SECONDS = 86_400  # that a process waits for the first one, which tokenises the data
ArgumentsT = TypeVar("ArgumentsT", bound=TrainingArguments)


class LoopTrainer(Trainer):
    """Trains by numbered micro-batches; the base of every command's trainer.

    Args:
        model: what is trained.
        arguments: Trainer's, of `arguments_for`.
        run: counters, log and checkpoints of this run.
        more: what another base of the command's trainer takes.
    """

    caller = "train"

    def __init__(self, model: nn.Module, arguments: TrainingArguments, run: Run, **more: Any) -> None:
        self.run, self.options = run, run.options
        self.inner = model
        self.groups = self.make_groups()
        self.watch = Watch()
        self.by_rows = row_sparse_parameters(model)
        self.step_loss = torch.zeros((), device=arguments.device)
        if self.by_rows and arguments.world_size > 1:
            # DDP would want dense gradients of them; it leaves them to `average_rows`.
            nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, self.by_rows)
        super().__init__(model=model, args=arguments, callbacks=[_Steps(self)], **more)
        self.remove_callback(PrinterCallback)  # a library does not print
        if self.by_rows and arguments.world_size > 1:
            for name in self.by_rows:
                dist.broadcast(model.get_parameter(name).data, 0)

    # -- what a command says

    def make_groups(self) -> dict[str, list[nn.Parameter]]:
        """Sort what is trained into the groups that have a rate of their own."""
        return make_groups(self.inner, self.options)

    def micro_batch(self, step: int, part: int) -> dict[str, Any]:
        """Return this process's inputs of one part of a step."""
        raise NotImplementedError

    # -- what Trainer asks for

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this process's micro-batches from the run's step on."""
        return DataLoader(_Micro(self), batch_size=None)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser, which looks at the gradients before every step."""
        if self.optimizer is None:
            self.optimizer = make_updater(self.groups, self.options, self.caller)
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
            loss: Any = self.compute_loss(model, inputs)
        self.accelerator.backward(loss)
        self.step_loss += loss.detach() / self.args.gradient_accumulation_steps
        return loss.detach()

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


class _Micro(IterableDataset[dict[str, Any]]):
    """This process's micro-batches of every step from the run's on."""

    def __init__(self, trainer: LoopTrainer) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        step = self.trainer.run.step
        while True:
            for part in range(self.trainer.args.gradient_accumulation_steps):
                yield {**self.trainer.micro_batch(step, part), "part": part}
            step += 1


class _Steps(TrainerCallback):
    """What follows an update: log, validation, checkpoint, end."""

    def __init__(self, trainer: LoopTrainer) -> None:
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


def arguments_for(
    run: Run,
    device: str | None,
    world: int,
    kind: type[ArgumentsT] = TrainingArguments,  # type: ignore[assignment]  # the bound is its own default
    micro_batch: int | None = None,
) -> ArgumentsT:
    """Make Trainer's arguments: its own logs, checkpoints and clipping are off.

    Args:
        kind: their class.
        micro_batch: rows of one forward pass of one process; None: as the options say.
    """
    options = run.options
    steps = run.total_steps()
    micro = micro_batch or options.micro_batch or max(1, options.batch // world)
    arguments = kind(
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
