"""Read a dense FFN out of a module: weights, activation, and what else the module holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nogemm.convert._families import SiteAdapter
from nogemm.errors import ConfigError

_ACTIVATION_OF_CLASS = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_pytorch_tanh",
    "PytorchGELUTanh": "gelu_pytorch_tanh",
    "NewGELUActivation": "gelu_new",
    "FastGELUActivation": "gelu_new",  # the same tanh formula, other constants' order
    "AccurateGELUActivation": "gelu_new",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def read_linear(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight [out, in] and bias of a Linear or of transformers' Conv1D, which stores its transpose."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    if type(linear).__name__ == "Conv1D":
        weight = weight.T
    return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None


def activation_name(owner: nn.Module, path: str) -> str:
    """Return an activation's name as DenseFFN spells it, or its class name if DenseFFN does not know it."""
    act: Any = owner
    for part in path.split("."):
        act = getattr(act, part, None)
    if act is None:
        return path  # hard-coded in the class: the adapter gives the name itself
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_pytorch_tanh"
    label = type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", str(act))
    return _ACTIVATION_OF_CLASS.get(label, label)


def is_linear(owner: nn.Module, path: str) -> bool:
    """Tell whether `path` leads to an nn.Linear or to transformers' Conv1D."""
    if not is_module(owner, path):
        return False
    linear = owner.get_submodule(path)
    return isinstance(linear, nn.Linear) or type(linear).__name__ == "Conv1D"


def is_module(owner: nn.Module, path: str) -> bool:
    """Tell whether `path` leads to a module."""
    try:
        owner.get_submodule(path)
    except AttributeError:
        return False
    return True


def check_nothing_else_is_lost(name: str, owner: nn.Module, adapter: SiteAdapter) -> None:
    """Refuse an adapter that would replace a whole class which holds more than an FFN, attention for example."""
    known = tuple(f"{path}." for path in (adapter.up, adapter.gate, adapter.down, adapter.activation) if path)
    other = [key for key, _ in owner.named_parameters() if not key.startswith(known)]
    if other and not adapter.put:
        raise ConfigError(
            f"site {name!r}: {type(owner).__name__} holds weights beside its FFN ({', '.join(other[:3])}), which "
            "would be lost. Register the class that is only the FFN, or say with put= where the new layer goes"
        )
