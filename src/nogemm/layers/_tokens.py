"""Tokens as layers take them: leading dimensions flattened, and those that are not finite kept to themselves.

Legend: N tokens (all leading dimensions flattened), D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nogemm.config import LayerConfig
from nogemm.errors import DtypeError, ShapeError
from nogemm.ops.neurons_at_indices import finite_tokens


def flatten_tokens(owner: str, config: LayerConfig, x: Tensor, width: int) -> Tensor:
    """Return x as [N, width], or say in the caller's words why it does not fit."""
    if x.dim() == 0 or x.shape[-1] != width:
        raise ShapeError(f"{owner}: expected last dim {width}, got x of shape {tuple(x.shape)}; built from {config}")
    if not x.is_floating_point():
        raise DtypeError(f"{owner}: expected a floating-point x, got {x.dtype}")
    return x.reshape(-1, width)


def each_alone(answer: Callable[[Tensor], Tensor], x_ND: Tensor) -> Tensor:
    """Answer tokens that hold NaN or infinity with NaN, and keep them away from the others."""
    finite_N1 = finite_tokens(x_ND)
    if finite_N1 is None:
        return answer(x_ND)
    return torch.where(finite_N1, answer(torch.where(finite_N1, x_ND, 0.0)), float("nan"))
