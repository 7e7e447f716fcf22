"""Run a module on made-up tokens and watch its matrices.

Reading order: `Unproven`, `run`, `run_and_watch`, `first_that_runs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert._candidates import Candidate
from nogemm.convert._tensors import Arguments, copied, tensors_in

_OWN = frozenset(vars(nn.Module()))  # what torch keeps on every module


class Unproven(Exception):
    """Why a candidate is not what it looks like; the message completes the sentence "left dense: ..."."""


class CannotRun(Unproven):
    """Its module does not take what it was given; another call may do."""


@dataclass
class Seen:
    """Inputs and outputs of one matrix over a run."""

    inputs: list[Tensor]
    outputs: list[Tensor]


def random_calls(d: int) -> list[Arguments]:
    """Return calls for a module whose arguments are all tokens of width d: one, two or three of them."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(2, 3, d, generator=generator) for _ in range(3)]
    calls = [Arguments(tuple(x[:count]), {}) for count in (1, 2, 3)]
    return [*calls, Arguments((x[0].reshape(6, d),), {})]


def first_that_runs(owner: nn.Module, calls: list[Arguments]) -> Arguments:
    """Return the first call that the module accepts and answers with finite numbers."""
    reason = ""
    for call in calls:
        try:
            answer = run(owner, call)
        except Unproven as error:
            reason = reason or str(error)
            continue
        if answer and all(torch.isfinite(part).all() for part in answer):
            return call
        reason = reason or "its module returns no tensor, or infinite numbers, on random input"
    raise CannotRun(reason)


def run(owner: nn.Module, call: Arguments, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    fresh = copied(call)
    before = dict(_kept(owner))
    try:
        answer = owner(*fresh.positional, **fresh.named)
    except Exception as error:
        raise Unproven(f"its module cannot be run on random input: {first_line(error)}") from error
    # What the forward leaves on a module may be read by another one: it counts as returned.
    left = [value for path, (value, size) in _kept(owner) if path not in before or not _is(before[path], value, size)]
    return [part.float() for part in tensors_in((answer, left, fresh)) if part.is_floating_point()]


def _kept(owner: nn.Module) -> Iterator[tuple[str, tuple[Any, int]]]:
    """Yield what modules keep beside parameters and buffers, each with its length, which growing changes."""
    for path, module in owner.named_modules():
        for key, value in vars(module).items():
            if key not in _OWN and isinstance(value, (Tensor, list, tuple, dict)):
                yield f"{path}.{key}", (value, -1 if isinstance(value, Tensor) else len(value))


def _is(before: tuple[Any, int], value: Any, size: int) -> bool:
    return before[0] is value and before[1] == size


def run_and_watch(
    owner: nn.Module, candidate: Candidate, call: Arguments
) -> tuple[dict[str, Seen], dict[str, nn.Module]]:
    """Run with hooks; return what went through each matrix, and the leaf modules called between first and last."""
    seen = {path: Seen([], []) for path in candidate.matrices}
    order: list[str] = []
    handles = []
    for path, module in owner.named_modules():
        watch = seen.get(path)

        def hook(_: nn.Module, args: Any, answer: Any, path: str = path, watch: Seen | None = watch) -> None:
            order.append(path)
            if watch is not None and args and isinstance(args[0], Tensor) and isinstance(answer, Tensor):
                watch.inputs.append(args[0].detach().clone())
                watch.outputs.append(answer.detach().clone())

        if watch is not None or not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(hook))
    try:
        run(owner, call)
    finally:
        for handle in handles:
            handle.remove()
    calls = {len(one.inputs) for one in seen.values()}
    if len(calls) != 1 or calls == {0}:
        raise Unproven("its matrices are not all called, once each per token")
    first = min(order.index(path) for path in candidate.enter)
    inside = order[first : order.index(candidate.leave)]
    found = {path: owner.get_submodule(path) for path in dict.fromkeys(inside) if path not in candidate.matrices}
    return seen, found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}" if str(error).strip() else repr(error)
