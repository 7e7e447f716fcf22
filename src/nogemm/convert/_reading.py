"""Read a dense FFN out of a module: weights, activation, and what else the module holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

from nogemm.activations import BY_CLASS, KNOWN
from nogemm.convert._families import SiteAdapter
from nogemm.errors import ConfigError
from nogemm.layers import FFN, PackedFFN

KNOWN_ACTIVATIONS = {one.names[0]: one.function for one in KNOWN}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_linear(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return weight [out, in] and bias of a Linear or of transformers' Conv1D, which stores its transpose."""
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    if type(linear).__name__ == "Conv1D":
        weight = weight.T
    return weight.detach(), bias.detach() if isinstance(bias, Tensor) else None


def activation_name(owner: nn.Module, path: str) -> str:
    """Return an activation's name as DenseFFN spells it, or its class name if DenseFFN does not know it."""
    act = look_up(owner, path)
    if act is None:
        return path  # hard-coded in the class: the adapter gives the name itself
    if isinstance(act, nn.GELU) and act.approximate == "tanh":
        return "gelu_pytorch_tanh"
    label = type(act).__name__ if isinstance(act, nn.Module) else getattr(act, "__name__", str(act))
    if type(act).__module__.startswith(("torch.", "transformers.")) and label in BY_CLASS:
        return BY_CLASS[label]
    return computed_name(act) or label  # a name alone proves nothing: functions called gelu compute several things


def computed_name(act: Any) -> str | None:
    """Name the activation that gives what `act` gives, if DenseFFN knows one."""
    x = torch.linspace(-12.0, 12.0, 97, device="cpu", dtype=torch.float32)  # far enough out to see one that is clipped
    try:
        with torch.no_grad():
            y = act(x)
            return next((name for name, known in KNOWN_ACTIVATIONS.items() if alike(y, known(x))), None)
    except Exception:  # whatever a stranger's function does with a row of numbers
        return None


def alike(a: Tensor, b: Tensor, size: Tensor | float = 0.0) -> bool:
    """Compare fp32 results of a few operations on numbers of this size, each operation rounded."""
    size = size.abs() if isinstance(size, Tensor) else size
    limit = 16 * torch.finfo(torch.float32).eps
    return a.shape == b.shape and bool(((a - b).abs() <= limit * (1.0 + b.abs() + size)).all())


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return (out, in) of a linear layer, plain, wrapped or quantised; None for any other module."""
    if isinstance(module, (FFN, PackedFFN)):
        return None
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):
        return linear_shape(base)
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        weight = module.weight
        return (weight.shape[1], weight.shape[0]) if isinstance(weight, Tensor) else None
    widths = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(widths[0], int) or not isinstance(widths[1], int):
        return None
    # A module with widths and children, and no weight of its own, is a block and not a matrix.
    leaf = hasattr(module, "weight") or not any(True for _ in module.children())
    return (widths[0], widths[1]) if leaf else None


def linear_fault(module: nn.Module) -> str | None:
    """Say why a linear layer (`linear_shape`) cannot be read as a plain matrix, and what to do; None if it can."""
    kind = type(module).__name__
    if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
        return f"is wrapped in {kind}: merge first, with model.merge_and_unload()"
    if _computed(module):
        return f"computes its weight ({kind}): merge first, with torch.nn.utils.parametrize.remove_parametrizations"
    weight = getattr(module, "weight", None)
    plain = isinstance(module, nn.Linear) or kind == "Conv1D"
    if not plain or not isinstance(weight, Tensor) or weight.dtype not in _DTYPES or weight.dim() != 2:
        return f"is quantised or replaced already ({kind}): convert the floating-point model, and quantise afterwards"
    return None


def _computed(module: nn.Module) -> bool:
    return torch.nn.utils.parametrize.is_parametrized(module, "weight") or hasattr(module, "weight_g")


def look_up(owner: nn.Module, path: str) -> Any:
    """Follow a path of attributes, modules or not; None where it ends early."""
    value: Any = owner
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def is_module(owner: nn.Module, path: str) -> bool:
    """Tell whether `path` leads to a module."""
    try:
        owner.get_submodule(path)
    except AttributeError:
        return False
    return True


def check_nothing_else_is_lost(name: str, owner: nn.Module, adapter: SiteAdapter) -> None:
    """Refuse an adapter that would replace a whole class which holds more than an FFN, attention for example."""
    known = tuple(f"{path}." for path in (*adapter.matrices, adapter.activation))
    other = [key for key, _ in owner.named_parameters() if not key.startswith(known)]
    if other and not adapter.put:
        raise ConfigError(
            f"site {name!r}: {type(owner).__name__} holds weights beside its FFN ({', '.join(other[:3])}), which "
            "would be lost. Register the class that is only the FFN, or say with put= where the new layer goes"
        )
