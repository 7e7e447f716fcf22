"""Orthonormal fast Hadamard transform of the last dimension.

Legend: N tokens, D = m P width, P = 2^k, m = 1, 12 or 20.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel

ORDERS = (12, 20)  # besides the powers of two
_OPERATIONS = {1: 0, 12: 68, 20: 154}  # of the transform of order m, a multiply-add counted as 2


def hadamard_order(width: int) -> int:
    """Return m of width = m 2^k, with m = 1, 12 or 20; 0 for any other width."""
    for order in (1, *ORDERS):
        power = width // order
        if width > 0 and width % order == 0 and power & (power - 1) == 0:
            return order
    return 0


def hadamard_flops(width: int) -> float:
    """Return the FLOP of the transform of one row: P log2 P additions per row of P, and P times 68 or 154 for m."""
    order = hadamard_order(width)
    power = width // order
    return width * math.log2(power) + power * _OPERATIONS[order]


def hadamard_matrix(order: int) -> Tensor:
    """Return the symmetric H_12 or H_20 of `hadamard`, float64 entries +1 and -1; H H = m I.

        H_12 = (J_3 - 2 I_3) x H_4 + 2 I_3 x D,   D e = (e_1, e_0, -e_2, e_3)
        H_20 = [[C + I, C - I], [C - I, -C - I]],   C = [[0, 1'], [1, S]],   S = 2 (I_3 x J_3 + J_3 x I_3) - J_9 - 3 I_9

    x is the Kronecker product, J all ones. Source: H_12 is Williamson's array for three (1944), its columns permuted
    and negated until it is symmetric; H_20 is Paley's second construction (1933) for the field of nine elements
    a + b i: the difference of two of them is a square where exactly one of a, b agrees.
    """
    ones, eye = torch.ones(3, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    if order == 12:
        two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        turn = torch.block_diag(two.new_tensor([[0, 1], [1, 0]]), two.new_tensor([[-1, 0], [0, 1]]))
        return torch.kron(ones - 2 * eye, torch.kron(two, two)) + 2 * torch.kron(eye, turn)
    conference = torch.ones(10, 10, dtype=torch.float64)
    conference[0, 0] = 0.0
    lines = torch.kron(eye, ones) + torch.kron(ones, eye)
    conference[1:, 1:] = 2 * lines - torch.kron(ones, ones) - 3 * torch.kron(eye, eye)
    unit = torch.eye(10, dtype=torch.float64)
    top = torch.cat((conference + unit, conference - unit), 1)
    return torch.cat((top, torch.cat((conference - unit, -conference - unit), 1)))


def hadamard_reference(x: Tensor) -> Tensor:
    """Transform by log2 P rounds of sums and differences, then by H_m; see `hadamard`."""
    width = x.shape[-1]
    order = hadamard_order(width)
    # bfloat16 butterflies would round log2 D times; native kernels round once, and so does this.
    y = x.reshape(-1, width).to(torch.promote_types(x.dtype, torch.float32))
    half = 1
    while half < width // order:
        pairs = y.reshape(-1, width // (2 * half), 2, half)
        y = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    if order > 1:
        y = hadamard_matrix(order).to(y) @ y.reshape(-1, order, width // order)
    return (y.reshape(x.shape) * width**-0.5).to(x.dtype)


def hadamard(x: Tensor) -> Tensor:
    """Apply the orthonormal Hadamard matrix to the last dimension.

        y = x H_D / sqrt(D),   H_1 = [1],   H_2P = [[H_P, H_P], [H_P, -H_P]]   (Sylvester's order)
        H_mP = H_m x H_P   (Kronecker product: x is read as [m, P]),   m = 1, 12 or 20

    Symmetric and its own inverse, so it is its own backward too. H_12 and H_20 are in `hadamard_matrix`.

    Args:
        x: [..., D], D = m 2^k with m = 1, 12 or 20.
    Returns:
        y of x's shape and dtype, computed in at least float32.
    Raises:
        ShapeError: if D is none of these.
    Cost: D log2 P additions per row, and P times 68 (m = 12) or 154 (m = 20) FLOP; reads and writes each row once.
    Example:
        >>> hadamard(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    width = x.shape[-1] if x.dim() else 0
    if hadamard_order(width) == 0:
        raise ShapeError(
            f"hadamard: the last dimension must be m 2^k with m 1, 12 or 20, got x of shape {tuple(x.shape)}"
        )
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
