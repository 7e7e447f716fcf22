"""The vocabulary of activations: what they compute, transformers' names for them, and their numbers in native code.

Legend: N tokens, F neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.errors import ConfigError

# By transformers' names; `KNOWN` says what each of them is.
ActivationName = Literal["gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "silu", "swish"]


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One activation.

    Attributes:
        name: ours, which native code shares; `NUMBERS` has its number there.
        function: of tensors of any shape.
        names: transformers' names for it, the usual one first.
        classes: modules of torch and transformers that compute nothing else.
        zero_below: 0 for every negative number, so that pre-activations rank neurons as their answers do.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    names: tuple[str, ...]
    classes: tuple[str, ...]
    zero_below: bool = False


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


KNOWN = (
    Activation(name="gelu", function=F.gelu, names=("gelu",), classes=("GELUActivation", "GELU")),
    Activation(
        name="gelu_tanh",
        function=_gelu_tanh,
        names=("gelu_new", "gelu_pytorch_tanh"),
        # FastGELUActivation is the same formula with its constants in another order.
        classes=("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation", "GELUTanh", "PytorchGELUTanh"),
    ),
    Activation(name="quick_gelu", function=_quick_gelu, names=("quick_gelu",), classes=("QuickGELUActivation",)),
    Activation(name="relu", function=F.relu, names=("relu",), classes=("ReLU",), zero_below=True),
    Activation(
        name="relu2", function=_squared_relu, names=("relu2",), classes=("ReLUSquaredActivation",), zero_below=True
    ),
    Activation(name="silu", function=F.silu, names=("silu", "swish"), classes=("SiLU", "SiLUActivation")),
)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {name: one.function for one in KNOWN for name in one.names}
BY_CLASS: dict[str, str] = {cls: one.names[0] for one in KNOWN for cls in one.classes}
# csrc/packed/host/activations.h has the same numbers under the same names.
NUMBERS: dict[str, int] = {"relu": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4, "quick_gelu": 5}


def activation(name: str) -> Activation:
    """Find an activation by any of its names.

    Raises:
        ConfigError: nogemm does not know it; the message lists the names.
    """
    for one in KNOWN:
        if name == one.name or name in one.names:
            return one
    raise ConfigError(f"unknown activation {name!r}; nogemm knows {', '.join(ACTIVATIONS)}")


def taken_over(name: str) -> str:
    """Return what a tree of neurons takes over from the layer it replaces: gelu, relu or silu as they are, else gelu.

    Trees could compute the others too; checkpoints that were trained with gelu in their place must stay what they are.
    """
    return name if name in ("gelu", "relu", "silu") else "gelu"


def cutoff(scores_NF: Tensor, keep: float) -> Tensor:
    """Return mean + z std of each token's scores, [N, 1]; a normal distribution has the share `keep` above it."""
    z = deviations(keep)
    if z == -math.inf:
        return scores_NF.new_full((len(scores_NF), 1), z)
    mean_N1 = scores_NF.mean(-1, keepdim=True)
    return mean_N1 + z * (scores_NF - mean_N1).square().mean(-1, keepdim=True).sqrt()


def deviations(keep: float) -> float:
    """Return the z that a normal variable exceeds with probability `keep`; minus infinity for all."""
    return -math.inf if keep >= 1 else NormalDist().inv_cdf(1.0 - keep)
