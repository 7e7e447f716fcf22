"""What surrounds a training run: its packages, its processes, its directory, its randomness, its machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from nogemm.convert import converted
from nogemm.errors import ConfigError, DistributedError
from nogemm.hardware.cpu import machine, machine_line
from nogemm.models.inner import inner_model
from nogemm.train import checkpoint as ckpt
from nogemm.train.loop.options import LoopOptions
from nogemm.train.loop.updates import refit
from nogemm.train.memory import keep_freed_memory
from nogemm.train.optim import settle
from nogemm.train.progress import Progress
from nogemm.train.sources import describe
from nogemm.version import __version__

Found = TypeVar("Found")


def check_packages(options: LoopOptions, caller: str, *more: str) -> None:
    """Raise ConfigError unless what trains is installed; `more` names packages that this run needs besides."""
    for name in ("transformers", "accelerate", *more):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{caller} needs {name.replace('_', '-')}: pip install 'nogemm[{caller}]'")
    if options.tensorboard and not any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))):
        raise ConfigError(f"{caller}: tensorboard=True needs tensorboard: pip install tensorboard")


def check_shares(options: LoopOptions, world: int, device: str | None, caller: str) -> None:
    """Raise ConfigError unless a batch can be dealt to the processes and the device is there."""
    micro = options.micro_batch or max(1, options.batch // world)
    if options.batch % (world * micro):
        raise ConfigError(
            f"{caller}: batch={options.batch} cannot be dealt evenly to {world} processes in micro-batches of {micro}"
        )
    if device not in (None, "cpu", "cuda"):
        raise ConfigError(f"{caller}: device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{caller}: device='cuda', and torch sees no GPU")


@contextmanager
def session(output_dir: str | Path | None, caller: str) -> Iterator[tuple[Path, bool]]:
    """Hold a run's directory against other writers, and leave process and machine as they were.

    Gives the directory, and whether this is the first process, which alone writes. Without `output_dir` it is a
    temporary one.

    Raises:
        ConfigError: several processes without a directory. TrainingError: another run is writing there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and output_dir is None:
        raise ConfigError(f"{caller}: several processes need an output_dir that all of them see")
    scratch = Path(tempfile.mkdtemp(prefix="nogemm-")) if output_dir is None else None
    directory = Path(output_dir) if output_dir is not None else scratch
    assert directory is not None
    first = int(os.environ.get("RANK", "0")) == 0
    was_initialised = dist.is_available() and dist.is_initialized()
    try:
        with own_randomness(), keep_freed_memory(), _locked(directory, first), ckpt.room_is_told(directory, caller):
            yield directory, first
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if not was_initialised and dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def in_turn(work: Callable[[], Found], first: bool, world: int) -> Found | None:
    """Let the first process work while the others wait; if it fails, all fail.

    Raises:
        DistributedError: on the others, when the first one failed.
    """
    if world == 1:
        return work()
    failed = torch.zeros(1, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    found, error = None, None
    if first:
        try:
            found = work()
        except BaseException as caught:
            error = caught
            failed += 1
    dist.all_reduce(failed)
    if error is not None:
        raise error
    if bool(failed):
        raise DistributedError("the first process could not prepare the run; it says why")
    return found


def open_in_turn(run: Any, read: Callable[[bool], Found], resume: bool, world: int) -> Found:
    """Take a run up, and read its data: the first process tokenises, the others open what it wrote.

    Args:
        read: is told whether to take what lies in the run's directory.
    Raises:
        TrainingError: there is an earlier run, and it is not resumed.
    """

    def start() -> Found:
        if not resume:
            ckpt.refuse_earlier_run(run.directory)
        else:
            run.read()
        return read(resume)

    found = in_turn(start, run.first, world)
    if found is not None:
        return found
    if resume:
        run.read()
    return read(True)


def drive(run: Any, trainer: Any, bar: bool | None) -> None:
    """Make the steps that are left of a run, and bring what layers derive or let rest up to date."""
    with Progress(run.options.log_seconds, bar if run.first else False) as progress:
        run.progress = progress if run.first else None
        run.begin()
        if run.fraction() < 1.0:
            trainer.train()
        trainer.ready()
    settle(trainer.inner_optimiser)
    refit(trainer.inner)


def source_name(data: Any) -> str:
    """Return what a report calls the data: of a file its name alone."""
    return Path(describe(data)).name if isinstance(data, Path) or os.path.exists(str(data)) else describe(data)


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """Return how many numbers a model has: in all, in converted FFNs, and in embeddings of tokens."""
    ours = {id(p) for layer in converted(model).values() for p in layer.parameters()}
    every = list(model.parameters())
    words: Any = inner_model(model)
    return {
        "total": sum(p.numel() for p in every),
        "ffn": sum(p.numel() for p in every if id(p) in ours),
        "embeddings": int(words.get_input_embeddings().weight.numel()),
    }


def run_counts(run: Any, finished: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the reports of all commands share: of a finished run, and of the machine."""
    return {
        "loss": finished["loss"],
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": finished["seconds"],
        "training_seconds": finished["busy"],
        "tokens_per_second": run.tokens / max(finished["busy"], 1e-9),
        "history": run.history,
        "processes": finished["processes"],
        "device": finished["device"],
        "machine": machine_facts(),
    }


def machine_facts() -> dict[str, Any]:
    """Return what is known of the machine, with the versions of what trains."""
    facts = machine()
    own = {name: importlib.metadata.version(name) for name in ("accelerate", "tokenizers")}
    return facts | {"line": machine_line(), "versions": facts["versions"] | own | {"nogemm": __version__}}


@contextmanager
def _locked(directory: Path, first: bool) -> Iterator[None]:
    """Keep a second run out of the directory; the first process holds the lock for all."""
    if not first:
        yield
        return
    with ckpt.Lock(directory):
        yield


@contextmanager
def own_randomness() -> Iterator[None]:
    """Give Python, NumPy and torch (on the CPU) back their generators' states: Trainer seeds all three."""
    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
