"""Rows of a matrix that each token names: dot products with them, weighted sums of them, and gradients into them.

What every method needs that visits a few neurons per token: in-rows are dotted with the token, out-rows are summed.
The three ops are each other's gradients, so forward and backward cost the visited rows alone.

Legend: N tokens, P rows visited per token, R rows in all (leading dimensions of the matrix flattened), D width,
V rows that any token visited.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel


def flat_rows(rows: Tensor) -> Tensor:
    """View [..., D] as [R, D]."""
    return rows.reshape(-1, rows.shape[-1])


def neuron_dot_reference(x_ND: Tensor, index_NP: Tensor, rows: Tensor) -> Tensor:
    """Dot each token with its rows, one visited position at a time; see `neuron_dot`."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    rows_RD = flat_rows(rows)
    out_NP = torch.empty(index_NP.shape, dtype=wide, device=x_ND.device)
    for p in range(index_NP.shape[1]):
        out_NP[:, p] = (x_ND.to(wide) * rows_RD[index_NP[:, p].long()].to(wide)).sum(-1)
    return out_NP.to(x_ND.dtype)


def neuron_sum_reference(weight_NP: Tensor, index_NP: Tensor, rows: Tensor) -> Tensor:
    """Sum weighted rows with `embedding_bag`; see `neuron_sum`."""
    wide = torch.promote_types(weight_NP.dtype, torch.float32)
    rows_RD = flat_rows(rows)
    if weight_NP.numel() == 0 or rows_RD.numel() == 0:
        return weight_NP.new_zeros(weight_NP.shape[0], rows_RD.shape[1])
    y_ND = F.embedding_bag(index_NP, rows_RD.to(wide), per_sample_weights=weight_NP.to(wide), mode="sum")
    return y_ND.to(weight_NP.dtype)


def neuron_outer_reference(weight_NP: Tensor, index_NP: Tensor, x_ND: Tensor, n_rows: int) -> Tensor:
    """Add weight * token into the row that each pair names, [R, D]; rows that nobody names are zero."""
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    out_RD = torch.zeros(n_rows, x_ND.shape[1], dtype=wide, device=x_ND.device)
    for p in range(index_NP.shape[1]):
        out_RD.index_add_(0, index_NP[:, p].long(), weight_NP[:, p, None].to(wide) * x_ND.to(wide))
    return out_RD.to(x_ND.dtype)


def neuron_outer_visited_reference(
    weight_NP: Tensor, index_NP: Tensor, x_ND: Tensor, n_rows: int
) -> tuple[Tensor, Tensor]:
    """Return what `neuron_outer_reference` adds up, for the visited rows alone: their numbers [V] and values [V, D]."""
    visited_V, position = torch.unique(index_NP, return_inverse=True)
    return visited_V.int(), neuron_outer_reference(weight_NP, position.int(), x_ND, len(visited_V))


def row_gradient(weight_NP: Tensor, index_NP: Tensor, x_ND: Tensor, rows: Tensor, sparse: bool) -> Tensor:
    """Return the gradient of rows: dense, or a sparse tensor of the visited rows with rows' own shape."""
    n_rows = rows.shape[:-1].numel()
    native = has_native_kernel(x_ND)
    if not sparse:
        op = torch.ops.nogemm.neuron_outer if native else neuron_outer_reference
        return op(weight_NP, index_NP, x_ND, n_rows).view(rows.shape)
    outer = torch.ops.nogemm.neuron_outer_visited if native else neuron_outer_visited_reference
    visited_V, values_VD = outer(weight_NP, index_NP, x_ND, n_rows)
    place = torch.stack(torch.unravel_index(visited_V.long(), rows.shape[:-1]))
    return torch.sparse_coo_tensor(place, values_VD, rows.shape, is_coalesced=True, check_invariants=False)


def neuron_dot(x_ND: Tensor, index_NP: Tensor, rows: Tensor, sparse: bool = False) -> Tensor:
    """Dot each token with the rows it names.

        out[n, p] = sum_d x[n, d] * rows[index[n, p], d]

    Args:
        index_NP: int32, 0 <= index < R, in the order of rows' flattened leading dimensions.
        rows: [..., D] in x's dtype, float32 or bfloat16 on the native path.
        sparse: let the gradient of rows be a sparse tensor that holds the visited rows alone.
    Returns:
        out_NP in x's dtype, accumulated in float32.
    Raises:
        ShapeError: widths or numbers of tokens disagree.
        IndexError: an index outside [0, R).
    Cost: 2 N P D FLOP; reads N P rows at random places.
    Gradient: to x (a weighted sum of rows) and rows (scatter-add); indices are discrete.
    Example:
        >>> one = torch.tensor([[1]], dtype=torch.int32)
        >>> neuron_dot(torch.tensor([[2.0, 1.0]]), one, torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        tensor([[10.]])
    """
    if x_ND.dim() != 2 or index_NP.shape[:1] != x_ND.shape[:1] or rows.shape[-1:] != x_ND.shape[1:]:
        raise ShapeError(f"neuron_dot: {_shapes(x=x_ND, index=index_NP, rows=rows)} disagree")
    if not has_native_kernel(x_ND):
        return neuron_dot_reference(x_ND, index_NP, rows)
    return torch.ops.nogemm.neuron_dot(x_ND, index_NP, rows, sparse)


def neuron_sum(weight_NP: Tensor, index_NP: Tensor, rows: Tensor, sparse: bool = False) -> Tensor:
    """Sum the rows that each token names, weighted.

        y[n] = sum_p weight[n, p] * rows[index[n, p]]

    Args:
        weight_NP: in rows' dtype, float32 or bfloat16 on the native path.
        index_NP, rows, sparse: as in `neuron_dot`.
    Returns:
        y_ND in weight's dtype, accumulated in float32 in increasing p.
    Raises:
        ShapeError: weight and index disagree.
        IndexError: an index outside [0, R).
    Cost: 2 N P D FLOP; reads N P rows at random places.
    Gradient: to weight (dots with the rows) and rows (scatter-add).
    Example:
        >>> one = torch.tensor([[1]], dtype=torch.int32)
        >>> neuron_sum(torch.tensor([[2.0]]), one, torch.tensor([[0.0], [3.0]]))
        tensor([[6.]])
    """
    if weight_NP.dim() != 2 or weight_NP.shape != index_NP.shape:
        raise ShapeError(f"neuron_sum: {_shapes(weight=weight_NP, index=index_NP, rows=rows)} disagree")
    if not has_native_kernel(weight_NP):
        return neuron_sum_reference(weight_NP, index_NP, rows)
    return torch.ops.nogemm.neuron_sum(weight_NP, index_NP, rows, sparse)


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def _dot_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.sparse = inputs[3]


def _dot_backward(ctx: Any, grad_NP: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    x_ND, index_NP, rows = ctx.saved_tensors
    need_x, _, need_rows, _ = ctx.needs_input_grad
    grad_x = torch.ops.nogemm.neuron_sum(grad_NP, index_NP, rows, False) if need_x else None
    return grad_x, None, row_gradient(grad_NP, index_NP, x_ND, rows, ctx.sparse) if need_rows else None, None


def _sum_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.sparse = inputs[3]


def _sum_backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    weight_NP, index_NP, rows = ctx.saved_tensors
    need_weight, _, need_rows, _ = ctx.needs_input_grad
    grad_weight = torch.ops.nogemm.neuron_dot(grad_ND, index_NP, rows, False) if need_weight else None
    return grad_weight, None, row_gradient(weight_NP, index_NP, grad_ND, rows, ctx.sparse) if need_rows else None, None


define(
    "neuron_dot(Tensor x, Tensor index, Tensor rows, bool sparse) -> Tensor",
    lambda x, index, rows, sparse: neuron_dot_reference(x, index, rows),
    lambda x, index, rows, sparse: x.new_empty(index.shape),
)
define(
    "neuron_sum(Tensor weight, Tensor index, Tensor rows, bool sparse) -> Tensor",
    lambda weight, index, rows, sparse: neuron_sum_reference(weight, index, rows),
    lambda weight, index, rows, sparse: weight.new_empty(weight.shape[0], rows.shape[-1]),
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
