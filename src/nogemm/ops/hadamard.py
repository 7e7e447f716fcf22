"""Orthonormal fast Walsh-Hadamard transform of the last dimension.

Legend: N tokens, D width (a power of two).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel


def hadamard_reference(x: Tensor) -> Tensor:
    """Transform by log2 D rounds of sums and differences; see `hadamard`."""
    width = x.shape[-1]
    # bfloat16 butterflies would round log2 D times; native kernels round once, and so does this.
    y = x.reshape(-1, width).to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < width:
        pairs = y.reshape(-1, width // (2 * half), 2, half)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    return (y.reshape(x.shape) * width**-0.5).to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """Apply the orthonormal Walsh-Hadamard matrix to the last dimension.

        y = x H / sqrt(D),   H_1 = [1],   H_2D = [[H_D, H_D], [H_D, -H_D]]   (Sylvester's order)

    Symmetric and its own inverse, so it is its own backward too.

    Args:
        x: [..., D], D a power of two.
    Returns:
        y of x's shape and dtype, computed in at least float32.
    Raises:
        ShapeError: if D is not a power of two.
    Cost: D log2 D additions per row; reads and writes each row once.
    Example:
        >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    width = x.shape[-1] if x.dim() else 0
    if width < 1 or width & (width - 1):
        raise ShapeError(f"hadamard: the last dimension must be a power of two, got x of shape {tuple(x.shape)}")
    if not has_native_kernel(x):
        return hadamard_reference(x)
    return torch.ops.nogemm.hadamard(x)


def _backward(ctx: object, grad: Tensor) -> Tensor:
    return hadamard(grad)


define(
    "hadamard(Tensor x) -> Tensor",
    hadamard_reference,
    lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device),
)
torch.library.register_autograd("nogemm::hadamard", _backward, lib=LIBRARY)
