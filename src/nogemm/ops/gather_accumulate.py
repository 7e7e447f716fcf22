"""Weighted sum of one or more rows per table for each token.

Legend: N tokens, T tables, R rows per table, D row width, F rows read per table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.errors import DtypeError, ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel


def _flat_index(codes_NTF: Tensor, rows: int) -> Tensor:
    """Number the rows of all tables in one sequence: table t, row r becomes t R + r."""
    tables = codes_NTF.shape[1]
    first_row_T1 = torch.arange(tables, device=codes_NTF.device).unsqueeze(-1) * rows
    return (codes_NTF + first_row_T1).flatten(1)


def gather_accumulate_reference(
    codes_NTF: Tensor, scores_NTF: Tensor, tables_TRD: Tensor, row_scale_TR: Tensor | None = None
) -> Tensor:
    """Sum weighted rows with `embedding_bag`, so that no [N, T, D] tensor exists; see `gather_accumulate`."""
    tables, rows, width = tables_TRD.shape
    wide = torch.promote_types(scores_NTF.dtype, torch.float32)
    index_NB = _flat_index(codes_NTF, rows)
    weight_NB = scores_NTF.flatten(1).to(wide)
    if row_scale_TR is not None:
        weight_NB = weight_NB * row_scale_TR.flatten().to(wide)[index_NB]
    if codes_NTF.shape[0] == 0 or width == 0:
        return scores_NTF.new_zeros(codes_NTF.shape[0], width)
    if tables_TRD.dtype == torch.int8:  # table by table: a float copy of all rows would undo the compression
        y_ND = scores_NTF.new_zeros(codes_NTF.shape[0], width, dtype=wide)
        for index_N, weight_N in zip(index_NB.T, weight_NB.T, strict=True):
            y_ND += weight_N.unsqueeze(-1) * tables_TRD.reshape(-1, width)[index_N].to(wide)
        return y_ND.to(scores_NTF.dtype)
    y_ND = F.embedding_bag(
        index_NB, tables_TRD.reshape(tables * rows, width).to(wide), per_sample_weights=weight_NB, mode="sum"
    )
    return y_ND.to(scores_NTF.dtype)


def gather_accumulate_backward_reference(
    grad_ND: Tensor, codes_NTF: Tensor, scores_NTF: Tensor, tables_TRD: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of scores and tables.

    dscore[N, t, f] = <grad[N], table[t, code]>;   dtable[t, r] = sum over reads of row r of score * grad[N]
    """
    wide = torch.promote_types(scores_NTF.dtype, torch.float32)
    grad = grad_ND.to(wide)
    grad_scores = torch.empty_like(scores_NTF, dtype=wide)
    grad_tables = torch.zeros_like(tables_TRD, dtype=wide)
    for t in range(tables_TRD.shape[0]):
        for f in range(codes_NTF.shape[2]):
            code_N = codes_NTF[:, t, f].long()
            grad_scores[:, t, f] = (grad * tables_TRD[t, code_N].to(wide)).sum(-1)
            grad_tables[t].index_add_(0, code_N, scores_NTF[:, t, f, None].to(wide) * grad)
    return grad_scores.to(scores_NTF.dtype), grad_tables.to(tables_TRD.dtype)


def gather_accumulate(
    codes_NTF: Tensor, scores_NTF: Tensor, tables_TRD: Tensor, row_scale_TR: Tensor | None = None
) -> Tensor:
    """Sum the rows that each token's codes name, weighted by their scores.

        y[n] = sum_t sum_f score[n, t, f] * row_scale[t, code[n, t, f]] * table[t, code[n, t, f]]

    Source: LookupFFN (Zeng et al., 2023), equation 7, with the division done in the scores.

    Args:
        codes_NTF: int32, 0 <= code < R; checked by the native kernel in one pass.
        scores_NTF: float32 or bfloat16 on the native path, any floating dtype on the reference.
        tables_TRD: float32, bfloat16, or int8 (then `row_scale_TR` is needed).
        row_scale_TR: float32 scale of each row; no gradient.
    Returns:
        y_ND in scores' dtype, accumulated in float32 (float64 for float64) in increasing t.
    Raises:
        ShapeError: codes, scores and tables disagree; the message shows all three.
        DtypeError: int8 tables without a row scale, or with a gradient asked for.
        IndexError: a code outside [0, R).
    Cost: 2 N T F D FLOP; reads N T F D itemsize bytes of rows at random places.
    Gradient: to the scores (dot with the row) and the tables (scatter-add); codes are discrete.
    Example:
        >>> one = torch.tensor([[[1]]], dtype=torch.int32)
        >>> gather_accumulate(one, torch.tensor([[[2.0]]]), torch.tensor([[[0.0], [3.0]]]))
        tensor([[6.]])
    """
    if (
        codes_NTF.dim() != 3
        or codes_NTF.shape != scores_NTF.shape
        or tables_TRD.dim() != 3
        or (codes_NTF.shape[1] != tables_TRD.shape[0])
    ):
        raise ShapeError(
            f"gather_accumulate: codes and scores must be [N, T, F] and tables [T, R, D]; got codes "
            f"{tuple(codes_NTF.shape)}, scores {tuple(scores_NTF.shape)}, tables {tuple(tables_TRD.shape)}"
        )
    if tables_TRD.dtype == torch.int8 and row_scale_TR is None:
        raise DtypeError("gather_accumulate: int8 tables need row_scale, a float32 scale for each row")
    if not has_native_kernel(scores_NTF):
        return gather_accumulate_reference(codes_NTF, scores_NTF, tables_TRD, row_scale_TR)
    if row_scale_TR is not None:
        row_scale_TR = row_scale_TR.float()  # a model cast to bfloat16 after compression has cast it, too
    return torch.ops.nogemm.gather_accumulate(codes_NTF, scores_NTF, tables_TRD, row_scale_TR)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    codes, scores, tables, row_scale = inputs
    ctx.scaled = row_scale is not None
    ctx.save_for_backward(codes, scores, tables)


def _backward(ctx: Any, grad_ND: Tensor) -> tuple[None, Tensor, Tensor, None]:
    if ctx.scaled:
        raise DtypeError(
            "gather_accumulate: no gradient through rows with a scale; decompress() the layer before training"
        )
    codes, scores, tables = ctx.saved_tensors
    grad_scores, grad_tables = torch.ops.nogemm.gather_accumulate_backward(grad_ND.contiguous(), codes, scores, tables)
    return None, grad_scores, grad_tables, None


define(
    "gather_accumulate(Tensor codes, Tensor scores, Tensor tables, Tensor? row_scale) -> Tensor",
    gather_accumulate_reference,
    lambda codes, scores, tables, row_scale: scores.new_empty(codes.shape[0], tables.shape[2]),
)
define(
    "gather_accumulate_backward(Tensor grad, Tensor codes, Tensor scores, Tensor tables) -> (Tensor, Tensor)",
    gather_accumulate_backward_reference,
    lambda grad, codes, scores, tables: (scores.new_empty(scores.shape), tables.new_empty(tables.shape)),
)
torch.library.register_autograd("nogemm::gather_accumulate", _backward, setup_context=_setup_context, lib=LIBRARY)
