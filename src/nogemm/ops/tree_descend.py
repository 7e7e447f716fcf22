"""Walk each token down binary trees of neurons.

Legend: N tokens, D width, K trees, L levels, M = 2^L - 1 nodes per tree in heap order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel
from nogemm.ops.neuron_rows import dot_gradients, flat_rows


def levels_of(nodes: int) -> int:
    """Return L for a tree of 2^L - 1 nodes, or raise ShapeError."""
    levels = (nodes + 1).bit_length() - 1
    if nodes < 1 or nodes + 1 != 2**levels:
        raise ShapeError(f"a tree has 2^levels - 1 nodes (1, 3, 7, ...), got {nodes}")
    return levels


def tree_descend_reference(
    x_ND: Tensor, rows_KMD: Tensor, bias_KM: Tensor | None, threshold_KM: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Descend level by level; see `tree_descend`."""
    trees, nodes, _ = rows_KMD.shape
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    x, rows = x_ND.to(wide), flat_rows(rows_KMD)
    first_K = torch.arange(trees, device=x.device) * nodes
    node_NK = torch.zeros(x.shape[0], trees, dtype=torch.int64, device=x.device)
    z_levels, node_levels = [], []
    for _ in range(levels_of(nodes)):
        flat_NK = node_NK + first_K
        z_NK = torch.stack([(x * rows[flat_NK[:, k]].to(wide)).sum(-1) for k in range(trees)], dim=1)
        if bias_KM is not None:
            z_NK = z_NK + bias_KM.flatten()[flat_NK].to(wide)
        bar = 0.0 if threshold_KM is None else threshold_KM.flatten()[flat_NK].to(wide)
        z_levels.append(z_NK)
        node_levels.append(flat_NK)
        node_NK = 2 * node_NK + 1 + (z_NK > bar).long()
    return torch.stack(z_levels, dim=2).to(x_ND.dtype), torch.stack(node_levels, dim=2).int()


def tree_descend(
    x_ND: Tensor,
    rows_KMD: Tensor,
    bias_KM: Tensor | None = None,
    threshold_KM: Tensor | None = None,
    sparse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Walk each token down each tree by the sign of what it meets.

        i_0 = 0;   z_t = <rows[k, i_t], x> + bias[k, i_t];   i_{t+1} = 2 i_t + 1 + [z_t > threshold[k, i_t]]

    Source: UltraFastBERT (Belcak and Wattenhofer, 2023), the FFF descent; the threshold is ours (0 as published).

    Args:
        rows_KMD: M = 2^L - 1 nodes per tree in heap order, in x's dtype.
        bias_KM, threshold_KM: absent: 0. The threshold gets no gradient here.
        sparse: let the gradient of rows be a sparse tensor that holds the visited rows alone.
    Returns:
        z_NKL in x's dtype, accumulated in float32; nodes_NKL, int32, numbered k M + i. NaN goes left.
    Raises:
        ShapeError: M is not 2^L - 1, or shapes disagree.
    Cost: 2 N K L D FLOP, L dependent row reads per tree.
    Gradient: of z to x, rows and bias, at the visited nodes; nodes are discrete.
    Example:
        >>> tree_descend(torch.tensor([[2.0]]), torch.tensor([[[1.0], [5.0], [-1.0]]]))[1].tolist()
        [[[0, 2]]]
    """
    if x_ND.dim() != 2 or rows_KMD.dim() != 3 or x_ND.shape[1] != rows_KMD.shape[2]:
        raise ShapeError(
            f"tree_descend: expected x [N, D] and rows [K, M, D], got {tuple(x_ND.shape)} and {tuple(rows_KMD.shape)}"
        )
    levels_of(rows_KMD.shape[1])
    for name, value in (("bias", bias_KM), ("threshold", threshold_KM)):
        if value is not None and value.shape != rows_KMD.shape[:2]:
            raise ShapeError(f"tree_descend: {name} {tuple(value.shape)} must be [K, M] = {tuple(rows_KMD.shape[:2])}")
    if not has_native_kernel(x_ND):
        return tree_descend_reference(x_ND, rows_KMD, bias_KM, threshold_KM)
    return torch.ops.nogemm.tree_descend(x_ND, rows_KMD, bias_KM, threshold_KM, sparse)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, rows, _, _, sparse = inputs
    ctx.sparse = sparse
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, rows, output[1])


def _backward(ctx: Any, grad_NKL: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, rows, nodes_NKL = ctx.saved_tensors
    grad_x, grad_rows, grad_bias = dot_gradients(grad_NKL.flatten(1), x_ND, nodes_NKL.flatten(1), rows, ctx.sparse)
    return grad_x, grad_rows, grad_bias.view(rows.shape[:2]) if ctx.needs_input_grad[2] else None, None, None


def _fake(
    x: Tensor, rows: Tensor, bias: Tensor | None, threshold: Tensor | None, sparse: bool
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], rows.shape[0], (rows.shape[1] + 1).bit_length() - 1)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


define(
    "tree_descend(Tensor x, Tensor rows, Tensor? bias, Tensor? threshold, bool sparse) -> (Tensor, Tensor)",
    lambda x, rows, bias, threshold, sparse: tree_descend_reference(x, rows, bias, threshold),
    _fake,
)
torch.library.register_autograd("nogemm::tree_descend", _backward, setup_context=_setup_context, lib=LIBRARY)
