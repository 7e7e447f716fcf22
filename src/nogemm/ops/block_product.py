"""Product with a block-diagonal matrix: many small matrices on contiguous slices.

Legend: N tokens, n blocks, I and O input and output width of one block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel


def block_product_reference(x_NC: Tensor, weight_nOI: Tensor) -> Tensor:
    """Multiply each slice by its block with einsum; see `block_product`."""
    blocks, out_width, in_width = weight_nOI.shape
    x_NnI = x_NC.reshape(-1, blocks, in_width)
    return torch.einsum("noi,Nni->Nno", weight_nOI, x_NnI).reshape(-1, blocks * out_width)


def block_product_backward_reference(grad: Tensor, x_NC: Tensor, weight_nOI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight.

    dx[N, n, i] = sum_o weight[n, o, i] grad[N, n, o];   dweight[n, o, i] = sum_N grad[N, n, o] x[N, n, i]
    """
    blocks, out_width, in_width = weight_nOI.shape
    grad_NnO = grad.reshape(-1, blocks, out_width)
    x_NnI = x_NC.reshape(-1, blocks, in_width)
    grad_x = torch.einsum("noi,Nno->Nni", weight_nOI, grad_NnO).reshape(-1, blocks * in_width)
    return grad_x, torch.einsum("Nno,Nni->noi", grad_NnO, x_NnI)


def block_product(x_NC: Tensor, weight_nOI: Tensor) -> Tensor:
    """Multiply contiguous slices of each token by their own small matrix.

        y[N, n, o] = sum_i weight[n, o, i] x[N, n, i]

    Args:
        x_NC: [N, n I].
        weight_nOI: [n, O, I], rows are outputs; same dtype as x.
    Returns:
        y: [N, n O], x's dtype, accumulated in at least float32 by the native kernels.
    Raises:
        ShapeError: if x is not [N, n I].
    Cost: 2 N n O I FLOP; reads the weights once per call.
    Example:
        >>> block_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[[3.0]], [[4.0]]]))
        tensor([[3., 8.]])
    """
    if x_NC.dim() != 2 or weight_nOI.dim() != 3 or x_NC.shape[1] != weight_nOI.shape[0] * weight_nOI.shape[2]:
        raise ShapeError(
            f"block_product: x must be [N, n I] for weight [n, O, I]; got x {tuple(x_NC.shape)} "
            f"and weight {tuple(weight_nOI.shape)}"
        )
    if not has_native_kernel(x_NC):
        return block_product_reference(x_NC, weight_nOI)
    return torch.ops.nogemm.block_product(x_NC, weight_nOI)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x_NC, weight_nOI = ctx.saved_tensors
    return torch.ops.nogemm.block_product_backward(grad.contiguous(), x_NC, weight_nOI)


define(
    "block_product(Tensor x, Tensor weight) -> Tensor",
    block_product_reference,
    lambda x, weight: x.new_empty(x.shape[0], weight.shape[0] * weight.shape[1]),
)
define(
    "block_product_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    block_product_backward_reference,
    lambda grad, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
torch.library.register_autograd("nogemm::block_product", _backward, setup_context=_setup_context, lib=LIBRARY)
