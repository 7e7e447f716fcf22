"""Calls with nested tensors: copy one, list the tensors in an answer, and copy a model without its weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.layers.token_table import ids


@dataclass(frozen=True)
class Arguments:
    """What a module is called with."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


def copied(call: Arguments, dtype: torch.dtype | None = torch.float32) -> Arguments:
    """Copy a call deeply, onto the CPU with floating-point tensors in `dtype`; None leaves them as they are."""

    def fresh(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.detach().clone()
            return value if dtype is None else value.to("cpu", dtype if value.is_floating_point() else value.dtype)
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return tuple(fresh(item) for item in value)
        if isinstance(value, list):
            return [fresh(item) for item in value]
        if type(value) is dict:
            return {key: fresh(item) for key, item in value.items()}
        return value if isinstance(value, nn.Module) else copy.deepcopy(value)

    return Arguments(fresh(call.positional), fresh(call.named))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules, not its tensors: both share every parameter and buffer. Hooks are left out."""
    shared: dict[int, Any] = {id(value): value for value in (*model.parameters(), *model.buffers())}
    return without_hooks(copy.deepcopy(model, shared))


def without_hooks(model: nn.Module) -> nn.Module:
    """Take users' hooks from a copy, or they would see what is run there.

    Torch's own make weights, and those of token tables bring ids to them: they stay.
    """
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not _is_part(hook)]:
                del hooks[key]
    return model


def _is_part(hook: Any) -> bool:
    return type(hook).__module__.startswith("torch.") or getattr(hook, "__module__", "") == ids.__name__
