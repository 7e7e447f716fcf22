"""Find the dropouts of a module, which of them lie between the matrices of its FFN, and which also lie elsewhere.

A dropout that drops everything shows where it is: between the matrices, the second one reads zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert._candidates import Candidate
from nogemm.convert._running import Unproven, run, run_and_watch
from nogemm.convert._tensors import Arguments, structural_copy


@dataclass(frozen=True)
class Knob:
    """A dropout probability: `attribute` of the module at `path`; `target` is what an adapter names."""

    path: str
    attribute: str
    target: str

    def set(self, owner: nn.Module, value: float) -> None:
        """Change the probability in `owner`, a copy of the module."""
        setattr(owner.get_submodule(self.path), self.attribute, value)

    def get(self, owner: nn.Module) -> float:
        """Return the probability."""
        return float(getattr(owner.get_submodule(self.path), self.attribute))


@dataclass(frozen=True)
class Dropouts:
    """All dropouts of a module.

    Attributes:
        knobs: their probabilities.
        between: those between the matrices.
        both: those of `between` that drop something else, too.
        hidden: what the second matrix reads without any dropout, call by call.
    """

    knobs: tuple[Knob, ...]
    between: tuple[Knob, ...]
    both: tuple[Knob, ...]
    hidden: list[Tensor]

    @property
    def paths(self) -> tuple[str, ...]:
        """What an adapter calls the dropouts between the matrices."""
        return tuple(knob.target for knob in self.between)


def find_knobs(owner: nn.Module) -> tuple[Knob, ...]:
    """List every dropout probability of the module: of dropout modules, and numbers named after dropout."""
    found = []
    for path, module in owner.named_modules():
        is_dropout = is_dropout_module(module)
        for key, value in vars(module).items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                continue
            if is_dropout and key in ("p", "drop_prob"):
                found.append(Knob(path, key, path))
            elif not is_dropout and "drop" in key.lower() and 0 <= value < 1:
                found.append(Knob(path, key, f"{path}.{key}" if path else key))
    return tuple(found)


def is_dropout_module(module: nn.Module) -> bool:
    """Tell by its class's name whether a module is a dropout of some kind."""
    return "drop" in type(module).__name__.lower()


def find_dropouts(owner: nn.Module, candidate: Candidate, call: Arguments, knobs: tuple[Knob, ...]) -> Dropouts:
    """Turn one dropout after the other up to 1, in training mode, and see what becomes zero."""

    def turned(only: Knob | None) -> nn.Module:
        trial = structural_copy(owner).train()
        for knob in knobs:
            knob.set(trial, 1.0 if knob is only else 0.0)
        return trial

    hidden = run_and_watch(turned(None), candidate, call)[0][candidate.leave].inputs
    expected = run(turned(None), call)
    between, both = [], []
    for knob in knobs:
        try:
            seen, _ = run_and_watch(turned(knob), candidate, call)
        except Unproven:  # dropping everything skips the FFN: this is no dropout between its matrices
            continue
        reached = any(bool(x.any()) for x in seen[candidate.enter[0]].inputs)
        if not reached or any(bool(h.any()) for h in seen[candidate.leave].inputs):
            continue
        between.append(knob)
        trial = turned(knob)
        trial.get_submodule(candidate.leave).register_forward_pre_hook(restore(hidden))
        if any(not torch.equal(a, b) for a, b in zip(run(trial, call), expected, strict=True)):
            both.append(knob)
    return Dropouts(knobs, tuple(between), tuple(both), hidden)


def restore(hidden: list[Tensor]) -> Callable[[nn.Module, Any], Any]:
    """Return a hook that gives a matrix these inputs, call by call, whatever reaches it."""
    calls = 0

    def hook(_: nn.Module, args: Any) -> Any:
        nonlocal calls
        calls += 1
        return (hidden[(calls - 1) % len(hidden)], *args[1:])

    return hook
