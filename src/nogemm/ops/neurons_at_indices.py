"""A feed-forward layer of the neurons that each token names: dot products, activation, weighted sum.

What joins `neuron_dot` and `neuron_sum`; both directions cost what the lists hold, not the layer's width.

Legend: N tokens, D width, K list length, F neurons, E output width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nogemm.ops.neuron_rows import dot_gradients, neuron_dot, neuron_sum


def neurons_at_indices(
    x_ND: Tensor,
    index_NK: Tensor,
    up_FD: Tensor,
    up_bias_F: Tensor | None,
    down_FE: Tensor,
    activation: Callable[[Tensor], Tensor],
    *,
    gate_FD: Tensor | None = None,
    gate_bias_F: Tensor | None = None,
    up_activation: Callable[[Tensor], Tensor] | None = None,
    known_NK: Tensor | None = None,
) -> Tensor:
    """Run a feed-forward layer on the neurons that each token's list names.

        plain   y[n] = sum_k act(<x[n], up[i]> + up_bias[i]) down[i],   i = index[n, k] >= 0
        gated   y[n] = sum_k act(<x[n], gate[i]> + gate_bias[i]) up_act(<x[n], up[i]> + up_bias[i]) down[i]

    A token that is not finite gives NaN, whatever its list. `known` are the pre-activations of the gate (of a plain
    layer's up) if a router has computed them already: they are not computed again, and their gradients are the same.
    Shapes, dtypes and errors as for `nogemm.ops.neuron_dot`.

    Returns:
        y_NE without an output bias.
    Cost: 2 N K (D + E) FLOP, gated 2 N K (2 D + E); the backward twice that.
    """
    rows_FD, bias_F = (up_FD, up_bias_F) if gate_FD is None else (gate_FD, gate_bias_F)
    if known_NK is None:
        first_NK = neuron_dot(x_ND, index_NK, rows_FD, bias_F)
    else:
        first_NK = _KnownDots.apply(known_NK, x_ND, index_NK, rows_FD, bias_F)
    hidden_NK = activation(first_NK)
    if gate_FD is not None:
        up_NK = neuron_dot(x_ND, index_NK, up_FD, up_bias_F)
        hidden_NK = hidden_NK * (up_NK if up_activation is None else up_activation(up_NK))
    y_NE = neuron_sum(hidden_NK, index_NK, down_FE)
    finite_N1 = finite_tokens(x_ND)
    return y_NE if finite_N1 is None else torch.where(finite_N1, y_NE, float("nan"))


def finite_tokens(x_ND: Tensor) -> Tensor | None:
    """Mark the tokens without NaN and infinity, [N, 1]; None if that is all of them, which one sum tells."""
    if not torch.compiler.is_compiling() and bool(x_ND.detach().sum().isfinite()):
        return None
    return x_ND.isfinite().all(-1, keepdim=True)


class _KnownDots(torch.autograd.Function):
    """neuron_dot whose result is there already; only its gradient is computed."""

    @staticmethod
    def forward(
        ctx: Any, known_NK: Tensor, x_ND: Tensor, index_NK: Tensor, rows_FD: Tensor, bias_F: Tensor | None
    ) -> Tensor:
        ctx.biased = bias_F is not None
        ctx.save_for_backward(x_ND, index_NK, rows_FD)
        return known_NK.masked_fill(index_NK < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor, None, Tensor, Tensor | None]:
        x_ND, index_NK, rows_FD = ctx.saved_tensors
        grad_x, grad_rows, grad_bias = dot_gradients(grad[0], x_ND, index_NK, rows_FD, sparse=False)
        return None, grad_x, None, grad_rows, grad_bias if ctx.biased else None
