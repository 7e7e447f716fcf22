"""Neurons named by a list per token: dot products with their input rows, weighted sums of their output rows.

Two ops with their own gradients, and the function that joins them to a feed-forward layer of the named neurons only.
Both directions cost what the lists hold, not the layer's width. HiRE names its neurons this way.

Legend: N tokens, D width, K list length, F neurons, E output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel

_CHUNK = 1 << 22  # numbers gathered at a time by the references


def _chunks(index_NK: Tensor, width: int) -> Iterator[slice]:
    """Cut the tokens so that a chunk's gathered rows stay small."""
    step = max(1, _CHUNK // max(1, index_NK.shape[1] * width))
    for start in range(0, index_NK.shape[0], step):
        yield slice(start, start + step)


def _named(index_NK: Tensor) -> Tensor:
    return index_NK.clamp_min(0).long()


def list_dots_reference(x_ND: Tensor, index_NK: Tensor, rows_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Gather rows and multiply, a chunk of tokens at a time; see `list_dots`."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    parts = [x_ND.new_zeros(0, index_NK.shape[1], dtype=wide)]
    for part in _chunks(index_NK, x_ND.shape[1]):
        named = _named(index_NK[part])
        dots = (rows_FD[named].to(wide) @ x_ND[part].to(wide).unsqueeze(-1)).squeeze(-1)
        parts.append(dots if bias_F is None else dots + bias_F[named].to(wide))
    return torch.cat(parts).masked_fill(index_NK < 0, 0.0).to(x_ND.dtype)


def list_dots_backward_reference(
    grad_NK: Tensor, x_ND: Tensor, index_NK: Tensor, rows_FD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, rows and bias: weighted sums of rows, of tokens, and of the weights themselves."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    weights_NK = grad_NK.masked_fill(index_NK < 0, 0.0).to(wide)
    grad_rows = _scatter(weights_NK, index_NK, x_ND.to(wide), rows_FD)
    bias_F = torch.zeros(rows_FD.shape[0], dtype=wide, device=x_ND.device)
    bias_F.index_add_(0, _named(index_NK).flatten(), weights_NK.flatten())
    grad_x = list_sum_reference(weights_NK, index_NK, rows_FD)
    return grad_x.to(x_ND.dtype), grad_rows.to(rows_FD.dtype), bias_F.to(rows_FD.dtype)


def list_sum_reference(weights_NK: Tensor, index_NK: Tensor, rows_FE: Tensor) -> Tensor:
    """Gather rows and add them up, a chunk of tokens at a time; see `list_sum`."""
    wide = torch.promote_types(weights_NK.dtype, torch.float32)
    parts = [weights_NK.new_zeros(0, rows_FE.shape[1], dtype=wide)]
    masked_NK = weights_NK.masked_fill(index_NK < 0, 0.0).to(wide)
    for part in _chunks(index_NK, rows_FE.shape[1]):
        rows = rows_FE[_named(index_NK[part])].to(wide)
        parts.append((masked_NK[part].unsqueeze(1) @ rows).squeeze(1))
    return torch.cat(parts).to(weights_NK.dtype)


def list_sum_backward_reference(
    grad_NE: Tensor, weights_NK: Tensor, index_NK: Tensor, rows_FE: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weights (a dot product each) and rows (weighted sums of tokens)."""
    wide = torch.promote_types(weights_NK.dtype, torch.float32)
    grad = grad_NE.to(wide)
    grad_weights = list_dots_reference(grad, index_NK, rows_FE)
    masked_NK = weights_NK.masked_fill(index_NK < 0, 0.0).to(wide)
    grad_rows = _scatter(masked_NK, index_NK, grad, rows_FE)
    return grad_weights.to(weights_NK.dtype), grad_rows.to(rows_FE.dtype)


def _scatter(weights_NK: Tensor, index_NK: Tensor, tokens_ND: Tensor, rows_FD: Tensor) -> Tensor:
    """Return [F, D]: the sum of weight * token over all lists that name the neuron."""
    out_FD = torch.zeros(rows_FD.shape, dtype=weights_NK.dtype, device=rows_FD.device)
    for part in _chunks(index_NK, tokens_ND.shape[1]):
        terms = weights_NK[part].unsqueeze(-1) * tokens_ND[part].unsqueeze(1)
        out_FD.index_add_(0, _named(index_NK[part]).flatten(), terms.flatten(0, 1))
    return out_FD


def list_dots(x_ND: Tensor, index_NK: Tensor, rows_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """Multiply each token with the rows that its list names.

        s[n, k] = <x[n], rows[index[n, k]]> + bias[index[n, k]];   0 where the index is negative

    Args:
        x_ND: float32 or bfloat16 on the native path, any floating dtype on the reference.
        index_NK: int32, below F; negative entries are padding. A neuron may be named twice.
        rows_FD, bias_F: x's dtype.
    Returns:
        s_NK in x's dtype, accumulated in float32 (float64 for float64).
    Raises:
        ShapeError: the arguments disagree; the message shows their shapes.
        IndexError: an index of F or more.
    Cost: 2 N K D FLOP; reads N K D itemsize bytes at random places. Gradient: to x, rows and bias, as cheap.
    Example:
        >>> index = torch.tensor([[1, -1]], dtype=torch.int32)
        >>> list_dots(torch.tensor([[2.0]]), index, torch.tensor([[5.0], [3.0]]))
        tensor([[6., 0.]])
    """
    _check("list_dots", x_ND, index_NK, rows_FD, x_ND.shape[-1])
    if not has_native_kernel(x_ND):
        return list_dots_reference(x_ND, index_NK, rows_FD, bias_F)
    return torch.ops.nogemm.list_dots(x_ND, index_NK, rows_FD, bias_F)


def list_sum(weights_NK: Tensor, index_NK: Tensor, rows_FE: Tensor) -> Tensor:
    """Add up the rows that each token's list names, weighted.

        y[n] = sum_k weights[n, k] rows[index[n, k]];   negative indices add nothing

    Args, raises and cost as for `list_dots`; the gradient goes to weights and rows.

    Example:
        >>> index = torch.tensor([[1, -1]], dtype=torch.int32)
        >>> list_sum(torch.tensor([[2.0, 9.0]]), index, torch.tensor([[5.0], [3.0]]))
        tensor([[6.]])
    """
    _check("list_sum", weights_NK, index_NK, rows_FE, rows_FE.shape[-1])
    if weights_NK.shape != index_NK.shape:
        raise ShapeError(f"list_sum: weights {tuple(weights_NK.shape)} and index {tuple(index_NK.shape)} differ")
    if not has_native_kernel(weights_NK):
        return list_sum_reference(weights_NK, index_NK, rows_FE)
    return torch.ops.nogemm.list_sum(weights_NK, index_NK, rows_FE)


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
    Shapes, dtypes and errors as for `list_dots`.

    Returns:
        y_NE without an output bias.
    Cost: 2 N K (D + E) FLOP, gated 2 N K (2 D + E); the backward twice that.
    """
    rows_FD, bias_F = (up_FD, up_bias_F) if gate_FD is None else (gate_FD, gate_bias_F)
    if known_NK is None:
        first_NK = list_dots(x_ND, index_NK, rows_FD, bias_F)
    else:
        first_NK = _KnownDots.apply(known_NK, x_ND, index_NK, rows_FD, bias_F)
    hidden_NK = activation(first_NK)
    if gate_FD is not None:
        up_NK = list_dots(x_ND, index_NK, up_FD, up_bias_F)
        hidden_NK = hidden_NK * (up_NK if up_activation is None else up_activation(up_NK))
    y_NE = list_sum(hidden_NK, index_NK, down_FE)
    finite_N1 = finite_tokens(x_ND)
    return y_NE if finite_N1 is None else torch.where(finite_N1, y_NE, float("nan"))


def finite_tokens(x_ND: Tensor) -> Tensor | None:
    """Mark the tokens without NaN and infinity, [N, 1]; None if that is all of them, which one sum tells."""
    if not torch.compiler.is_compiling() and bool(x_ND.detach().sum().isfinite()):
        return None
    return x_ND.isfinite().all(-1, keepdim=True)


class _KnownDots(torch.autograd.Function):
    """list_dots whose result is there already; only its gradient is computed."""

    @staticmethod
    def forward(
        ctx: Any, known_NK: Tensor, x_ND: Tensor, index_NK: Tensor, rows_FD: Tensor, bias_F: Tensor | None
    ) -> Tensor:
        _dots_context(ctx, (x_ND, index_NK, rows_FD, bias_F), known_NK)
        return known_NK.masked_fill(index_NK < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor, None, Tensor, Tensor | None]:
        return (None, *_dots_backward(ctx, grad[0]))


def _check(op: str, first: Tensor, index_NK: Tensor, rows: Tensor, width: int) -> None:
    fits = first.dim() == 2 and index_NK.dim() == 2 and rows.dim() == 2 and rows.shape[1] == width
    if not fits or first.shape[0] != index_NK.shape[0]:
        raise ShapeError(
            f"{op}: expected [N, ...], an index [N, K] and rows [F, D]; got {tuple(first.shape)}, index "
            f"{tuple(index_NK.shape)}, rows {tuple(rows.shape)}"
        )


def _dots_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, index, rows, bias = inputs
    ctx.biased = bias is not None
    ctx.save_for_backward(x, index, rows)


def _dots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:
    x, index, rows = ctx.saved_tensors
    run = torch.ops.nogemm.list_dots_backward if has_native_kernel(x) else list_dots_backward_reference
    grad_x, grad_rows, grad_bias = run(grad.contiguous(), x, index, rows)
    return grad_x, None, grad_rows, grad_bias if ctx.biased else None


def _sum_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    weights, index, rows = ctx.saved_tensors
    grad_weights, grad_rows = torch.ops.nogemm.list_sum_backward(grad.contiguous(), weights, index, rows)
    return grad_weights, None, grad_rows


define(
    "list_dots(Tensor x, Tensor index, Tensor rows, Tensor? bias) -> Tensor",
    list_dots_reference,
    lambda x, index, rows, bias: x.new_empty(index.shape),
)
define(
    "list_dots_backward(Tensor grad, Tensor x, Tensor index, Tensor rows) -> (Tensor, Tensor, Tensor)",
    list_dots_backward_reference,
    lambda grad, x, index, rows: (x.new_empty(x.shape), rows.new_empty(rows.shape), rows.new_empty(rows.shape[0])),
)
define(
    "list_sum(Tensor weights, Tensor index, Tensor rows) -> Tensor",
    list_sum_reference,
    lambda weights, index, rows: weights.new_empty(weights.shape[0], rows.shape[1]),
)
define(
    "list_sum_backward(Tensor grad, Tensor weights, Tensor index, Tensor rows) -> (Tensor, Tensor)",
    list_sum_backward_reference,
    lambda grad, weights, index, rows: (weights.new_empty(weights.shape), rows.new_empty(rows.shape)),
)
torch.library.register_autograd("nogemm::list_dots", _dots_backward, setup_context=_dots_context, lib=LIBRARY)
torch.library.register_autograd("nogemm::list_sum", _sum_backward, setup_context=_sum_context, lib=LIBRARY)
