"""What surrounds a run: modes, hooks and gradient flags that are put back, Ctrl-C, and options compared on resuming."""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from nogemm.convert.sites import converted

# How transformers captures hidden states: hooks that are functions of this module, installed by the first call that
# asks for them and never removed, and a mark on every model that has them. Such a model cannot be pickled.
_CAPTURING = "transformers.utils.output_capturing"
_CAPTURED = "_output_capturing_hooks_installed"

FREE = frozenset({"log_seconds", "checkpoint_seconds"})
"""How often to log or to save may change when a run is resumed."""


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Switch dropout off for the whole run, and give every module its mode back afterwards."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def no_hook_left(model: nn.Module) -> Iterator[None]:
    """Take away the hooks that transformers installs within the block; those that were there before stay."""
    before = [(module, set(module._forward_hooks), _CAPTURED in module.__dict__) for module in model.modules()]
    try:
        yield
    finally:
        for module, known, marked in before:
            added = {key: hook for key, hook in module._forward_hooks.items() if key not in known}
            for key in [key for key, hook in added.items() if getattr(hook, "__module__", "") == _CAPTURING]:
                del module._forward_hooks[key]
            if not marked:
                module.__dict__.pop(_CAPTURED, None)


@contextmanager
def gradients_for(groups: Mapping[str, Iterable[nn.Parameter]], model: nn.Module) -> Iterator[None]:
    """Let only the parameters in the groups collect gradients, and restore every flag afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(parameter) for group in groups.values() for parameter in group}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None


@contextmanager
def sparse_rows(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let the layers that can give gradients of their visited rows alone do so, if `wanted`."""
    layers = list(converted(model).values())
    before = [layer.row_sparse for layer in layers]
    for layer in layers:
        layer.row_sparse = layer.row_sparse or wanted
    try:
        yield
    finally:
        for layer, flag in zip(layers, before, strict=True):
            layer.row_sparse = flag


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event that is looked at between steps; a second one ends at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def put_back() -> None:
        for number, before in old.items():
            signal.signal(number, before)

    def handler(number: int, frame: Any) -> None:
        event.set()
        put_back()

    for number in old:
        signal.signal(number, handler)
    try:
        yield event
    finally:
        put_back()


def changed_options(before: dict[str, Any], now: dict[str, Any], free: Collection[str] = FREE) -> list[str]:
    """List the options that differ, as "name: before, now after"; those in `free` may change."""
    before = {"optimizer": "adamw"} | {name: as_tuple(value) for name, value in before.items()}  # once the only one
    now = {name: as_tuple(value) for name, value in now.items()}
    return [f"{k}: {before.get(k)}, now {v}" for k, v in now.items() if k not in free and before.get(k) != v]


def as_tuple(value: Any) -> Any:
    """Turn JSON's lists back into tuples."""
    return tuple(value) if isinstance(value, list) else value
