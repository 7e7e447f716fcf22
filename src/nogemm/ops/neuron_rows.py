"""Rows of a matrix that each token names: dot products with them, weighted sums of them, and gradients into them.

What every method needs that visits a few neurons per token: in-rows are dotted with the token, out-rows are summed.
Dots and sums are each other's gradients, so forward and backward cost the visited rows alone.

Legend: N tokens, P rows named per token, R rows in all (leading dimensions of the matrix flattened), D width,
V rows that any token names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel

_CHUNK = 1 << 22  # numbers gathered at a time by the references


def flat_rows(rows: Tensor) -> Tensor:
    """View [..., D] as [R, D]."""
    return rows.reshape(-1, rows.shape[-1])


def _chunks(index_NP: Tensor, width: int) -> Iterator[slice]:
    """Cut the tokens so that a chunk's gathered rows stay small."""
    step = max(1, _CHUNK // max(1, index_NP.shape[1] * width))
    for start in range(0, index_NP.shape[0], step):
        yield slice(start, start + step)


def _named(index_NP: Tensor) -> Tensor:
    return index_NP.clamp_min(0).long()


def neuron_dot_reference(x_ND: Tensor, index_NP: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gather rows and multiply, a chunk of tokens at a time; see `neuron_dot`."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    rows_RD = flat_rows(rows)
    parts = [x_ND.new_zeros(0, index_NP.shape[1], dtype=wide)]
    for part in _chunks(index_NP, x_ND.shape[1]):
        named = _named(index_NP[part])
        dots = (rows_RD[named].to(wide) @ x_ND[part].to(wide).unsqueeze(-1)).squeeze(-1)
        parts.append(dots if bias is None else dots + bias.flatten()[named].to(wide))
    return torch.cat(parts).masked_fill(index_NP < 0, 0.0).to(x_ND.dtype)


def neuron_dot_backward_reference(
    grad_NP: Tensor, x_ND: Tensor, index_NP: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, rows and bias: weighted sums of rows, of tokens, and of the weights themselves."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    weight_NP = grad_NP.masked_fill(index_NP < 0, 0.0).to(wide)
    grad_x = neuron_sum_reference(weight_NP, index_NP, rows)
    grad_rows = neuron_outer_reference(weight_NP, index_NP, x_ND.to(wide), rows.shape[:-1].numel()).view(rows.shape)
    return grad_x.to(x_ND.dtype), grad_rows.to(rows.dtype), _bias_gradient(grad_NP, index_NP, rows)


def neuron_sum_reference(weight_NP: Tensor, index_NP: Tensor, rows: Tensor) -> Tensor:
    """Gather rows and add them up, a chunk of tokens at a time; see `neuron_sum`."""
    wide = torch.promote_types(weight_NP.dtype, torch.float32)
    rows_RD = flat_rows(rows)
    parts = [weight_NP.new_zeros(0, rows_RD.shape[1], dtype=wide)]
    masked_NP = weight_NP.masked_fill(index_NP < 0, 0.0).to(wide)
    for part in _chunks(index_NP, rows_RD.shape[1]):
        gathered = rows_RD[_named(index_NP[part])].to(wide)
        parts.append((masked_NP[part].unsqueeze(1) @ gathered).squeeze(1))
    return torch.cat(parts).to(weight_NP.dtype)


def neuron_sum_backward_reference(
    grad_ND: Tensor, weight_NP: Tensor, index_NP: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weights (a dot product each) and rows (weighted sums of tokens)."""
    wide = torch.promote_types(weight_NP.dtype, torch.float32)
    grad = grad_ND.to(wide)
    grad_weight = neuron_dot_reference(grad, index_NP, rows)
    grad_rows = neuron_outer_reference(weight_NP.to(wide), index_NP, grad, rows.shape[:-1].numel())
    return grad_weight.to(weight_NP.dtype), grad_rows.view(rows.shape).to(rows.dtype)


def neuron_outer_reference(weight_NP: Tensor, index_NP: Tensor, x_ND: Tensor, n_rows: int) -> Tensor:
    """Add weight * token into the row that each entry names, [R, D]; rows that nobody names are zero."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    out_RD = torch.zeros(n_rows, x_ND.shape[1], dtype=wide, device=x_ND.device)
    masked_NP = weight_NP.masked_fill(index_NP < 0, 0.0).to(wide)
    for part in _chunks(index_NP, x_ND.shape[1]):
        terms = masked_NP[part].unsqueeze(-1) * x_ND[part].to(wide).unsqueeze(1)
        out_RD.index_add_(0, _named(index_NP[part]).flatten(), terms.flatten(0, 1))
    return out_RD.to(x_ND.dtype)


def neuron_outer_visited_reference(
    weight_NP: Tensor, index_NP: Tensor, x_ND: Tensor, n_rows: int
) -> tuple[Tensor, Tensor]:
    """Return what `neuron_outer_reference` adds up, for the named rows alone: their numbers [V] and values [V, D]."""
    visited_V = torch.unique(index_NP)
    visited_V = visited_V[visited_V >= 0]
    outer_RD = neuron_outer_reference(weight_NP, index_NP, x_ND, n_rows)
    return visited_V.int(), outer_RD[visited_V.long()]


def row_gradient(weight_NP: Tensor, index_NP: Tensor, x_ND: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """Return the gradient of rows: dense, or a sparse tensor of the named rows with rows' own shape."""
    n_rows = rows.shape[:-1].numel()
    native = has_native_kernel(x_ND)
    if not sparse:
        op = torch.ops.nogemm.neuron_outer if native else neuron_outer_reference
        return op(weight_NP, index_NP, x_ND, n_rows).view(rows.shape)
    outer = torch.ops.nogemm.neuron_outer_visited if native else neuron_outer_visited_reference
    visited_V, values_VD = outer(weight_NP, index_NP, x_ND, n_rows)
    place = torch.stack(torch.unravel_index(visited_V.long(), rows.shape[:-1]))
    return torch.sparse_coo_tensor(place, values_VD, rows.shape, is_coalesced=True, check_invariants=False)


def neuron_dot(
    x_ND: Tensor, index_NP: Tensor, rows: Tensor, bias: Tensor | None = None, sparse: bool = False
) -> Tensor:
    """Dot each token with the rows it names.

        out[n, p] = <x[n], rows[index[n, p]]> + bias[index[n, p]];   0 where the index is negative

    Args:
        x_ND: float32 or bfloat16 on the native path, any floating dtype on the reference.
        index_NP: int32, below R, in the order of rows' flattened leading dimensions; negative entries are padding. A
            row may be named twice.
        rows: [..., D] in x's dtype. bias: one per row.
        sparse: let the gradient of rows be a sparse tensor that holds the named rows alone.
    Returns:
        out_NP in x's dtype, accumulated in float32 (float64 for float64).
    Raises:
        ShapeError: the arguments disagree; the message shows their shapes.
        IndexError: an index of R or more.
    Cost: 2 N P D FLOP; reads N P rows at random places. Gradient: to x, rows and bias, as cheap.
    Example:
        >>> index = torch.tensor([[1, -1]], dtype=torch.int32)
        >>> neuron_dot(torch.tensor([[2.0]]), index, torch.tensor([[5.0], [3.0]]))
        tensor([[6., 0.]])
    """
    _check("neuron_dot", x_ND, index_NP, rows, x_ND.shape[-1])
    if not has_native_kernel(x_ND):
        return neuron_dot_reference(x_ND, index_NP, rows, bias)
    return torch.ops.nogemm.neuron_dot(x_ND, index_NP, rows, bias, sparse)


def neuron_sum(weight_NP: Tensor, index_NP: Tensor, rows: Tensor, sparse: bool = False) -> Tensor:
    """Add up the rows that each token names, weighted.

        y[n] = sum_p weight[n, p] rows[index[n, p]];   negative indices add nothing

    Args, raises and cost as for `neuron_dot`; the gradient goes to weight and rows.

    Example:
        >>> index = torch.tensor([[1, -1]], dtype=torch.int32)
        >>> neuron_sum(torch.tensor([[2.0, 9.0]]), index, torch.tensor([[5.0], [3.0]]))
        tensor([[6.]])
    """
    _check("neuron_sum", weight_NP, index_NP, rows, rows.shape[-1])
    if weight_NP.shape != index_NP.shape:
        raise ShapeError(f"neuron_sum: weight {tuple(weight_NP.shape)} and index {tuple(index_NP.shape)} differ")
    if not has_native_kernel(weight_NP):
        return neuron_sum_reference(weight_NP, index_NP, rows)
    return torch.ops.nogemm.neuron_sum(weight_NP, index_NP, rows, sparse)


def _check(op: str, first: Tensor, index_NP: Tensor, rows: Tensor, width: int) -> None:
    fits = first.dim() == 2 and index_NP.dim() == 2 and rows.dim() >= 2 and rows.shape[-1] == width
    if not fits or first.shape[0] != index_NP.shape[0]:
        raise ShapeError(
            f"{op}: expected [N, ...], an index [N, P] and rows [..., D]; got {tuple(first.shape)}, index "
            f"{tuple(index_NP.shape)}, rows {tuple(rows.shape)}"
        )


def dot_gradients(
    grad_NP: Tensor, x_ND: Tensor, index_NP: Tensor, rows: Tensor, sparse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `neuron_dot` to x, rows and bias [R]."""
    if not sparse:
        native = has_native_kernel(x_ND)
        run = torch.ops.nogemm.neuron_dot_backward if native else neuron_dot_backward_reference
        return run(grad_NP.contiguous(), x_ND, index_NP, rows)
    grad_x = neuron_sum(grad_NP, index_NP, rows)
    return grad_x, row_gradient(grad_NP, index_NP, x_ND, rows, True), _bias_gradient(grad_NP, index_NP, rows)


def _bias_gradient(grad_NP: Tensor, index_NP: Tensor, rows: Tensor) -> Tensor:
    """Add up the gradients of each row's dots, [R]."""
    wide = torch.promote_types(grad_NP.dtype, torch.float32)
    bias_R = torch.zeros(rows.shape[:-1].numel(), dtype=wide, device=grad_NP.device)
    bias_R.index_add_(0, _named(index_NP).flatten(), grad_NP.masked_fill(index_NP < 0, 0.0).to(wide).flatten())
    return bias_R.to(rows.dtype)


def _dot_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, bool], output: Tensor) -> None:
    x_ND, index_NP, rows, bias, ctx.sparse = inputs
    ctx.bias_shape = None if bias is None else bias.shape
    ctx.save_for_backward(x_ND, index_NP, rows)


def _dot_backward(ctx: Any, grad_NP: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None, None]:
    x_ND, index_NP, rows = ctx.saved_tensors
    grad_x, grad_rows, grad_bias = dot_gradients(grad_NP, x_ND, index_NP, rows, ctx.sparse)
    return grad_x, None, grad_rows, None if ctx.bias_shape is None else grad_bias.view(ctx.bias_shape), None


def _sum_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.sparse = inputs[3]


def _sum_backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, Tensor, None]:
    weight_NP, index_NP, rows = ctx.saved_tensors
    if not ctx.sparse:
        run = torch.ops.nogemm.neuron_sum_backward
        grad_weight, grad_rows = run(grad_ND.contiguous(), weight_NP, index_NP, rows)
        return grad_weight, None, grad_rows, None
    grad_weight = torch.ops.nogemm.neuron_dot(grad_ND, index_NP, rows, None, False)
    return grad_weight, None, row_gradient(weight_NP, index_NP, grad_ND, rows, True), None


define(
    "neuron_dot(Tensor x, Tensor index, Tensor rows, Tensor? bias, bool sparse) -> Tensor",
    lambda x, index, rows, bias, sparse: neuron_dot_reference(x, index, rows, bias),
    lambda x, index, rows, bias, sparse: x.new_empty(index.shape),
)
define(
    "neuron_dot_backward(Tensor grad, Tensor x, Tensor index, Tensor rows) -> (Tensor, Tensor, Tensor)",
    neuron_dot_backward_reference,
    lambda grad, x, index, rows: (
        x.new_empty(x.shape),
        rows.new_empty(rows.shape),
        rows.new_empty(rows.shape[:-1].numel()),
    ),
)
define(
    "neuron_sum(Tensor weight, Tensor index, Tensor rows, bool sparse) -> Tensor",
    lambda weight, index, rows, sparse: neuron_sum_reference(weight, index, rows),
    lambda weight, index, rows, sparse: weight.new_empty(weight.shape[0], rows.shape[-1]),
)
define(
    "neuron_sum_backward(Tensor grad, Tensor weight, Tensor index, Tensor rows) -> (Tensor, Tensor)",
    neuron_sum_backward_reference,
    lambda grad, weight, index, rows: (weight.new_empty(weight.shape), rows.new_empty(rows.shape)),
)
define(
    "neuron_outer(Tensor weight, Tensor index, Tensor x, int n_rows) -> Tensor",
    neuron_outer_reference,
    lambda weight, index, x, n_rows: x.new_empty(n_rows, x.shape[1]),
)


def _outer_visited_fake(weight: Tensor, index: Tensor, x: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    visited = torch.library.get_ctx().new_dynamic_size()
    return index.new_empty(visited), x.new_empty(visited, x.shape[1])


define(
    "neuron_outer_visited(Tensor weight, Tensor index, Tensor x, int n_rows) -> (Tensor, Tensor)",
    neuron_outer_visited_reference,
    _outer_visited_fake,
)
torch.library.register_autograd("nogemm::neuron_dot", _dot_backward, setup_context=_dot_context, lib=LIBRARY)
torch.library.register_autograd("nogemm::neuron_sum", _sum_backward, setup_context=_sum_context, lib=LIBRARY)
