"""Sums of the items that fall into each bucket of each table: the adjoint of a gather with weights of one.

Legend: I items, T tables, R rows (buckets) per table, D item width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import LIBRARY, define, has_native_kernel
from nogemm.ops.gather_accumulate import gather_accumulate


def bucket_sum_reference(values_ID: Tensor, codes_IT: Tensor, rows: int) -> Tensor:
    """Add up items table by table; see `bucket_sum`."""
    wide = torch.promote_types(values_ID.dtype, torch.float32)
    tables_TRD = values_ID.new_zeros(codes_IT.shape[1], rows, values_ID.shape[1], dtype=wide)
    for table_RD, codes_I in zip(tables_TRD, codes_IT.T.long(), strict=True):
        table_RD.index_add_(0, codes_I, values_ID.to(wide))
    return tables_TRD.to(values_ID.dtype)


def _bucket_sum(values_ID: Tensor, codes_IT: Tensor, rows: int) -> Tensor:
    """Scatter by the kernel that gives tables their gradient, where there is one."""
    if not has_native_kernel(values_ID) or values_ID.shape[0] == 0:
        return bucket_sum_reference(values_ID, codes_IT, rows)
    codes_ITF = codes_IT.unsqueeze(-1).contiguous()
    ones = torch.ones(codes_ITF.shape, dtype=values_ID.dtype, device=values_ID.device)
    like = values_ID.new_zeros(codes_IT.shape[1], rows, values_ID.shape[1])
    return torch.ops.nogemm.gather_accumulate_backward(values_ID.contiguous(), codes_ITF, ones, like)[1]


def bucket_sum(values_ID: Tensor, codes_IT: Tensor, rows: int) -> Tensor:
    """Sum the items in each bucket.

        table[t, r] = sum of values[i] over the items i with code[i, t] = r

    Source: YOSO (Zeng et al., 2021), as in LookupFFN (Zeng et al., 2023), equation 3, without the factor 1/h.

    Args:
        codes_IT: int32, 0 <= code < rows.
        rows: R, at least 1.
    Returns:
        tables [T, R, D] of the values' dtype; empty buckets are 0.
    Raises:
        ShapeError: values and codes disagree about the number of items.
    Gradient: to the values, dvalues[i] = sum_t dtable[t, code[i, t]].
    Cost: I T D additions; writes T R D numbers.
    Example:
        >>> bucket_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0], [1], [0]], dtype=torch.int32), rows=2)
        tensor([[[5.],
                 [2.]]])
    """
    if values_ID.dim() != 2 or codes_IT.dim() != 2 or values_ID.shape[0] != codes_IT.shape[0] or rows < 1:
        raise ShapeError(
            f"bucket_sum: values must be [I, D], codes [I, T] and rows at least 1; got values "
            f"{tuple(values_ID.shape)}, codes {tuple(codes_IT.shape)}, rows {rows}"
        )
    return torch.ops.nogemm.bucket_sum(values_ID, codes_IT, rows)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad_TRD: Tensor) -> tuple[Tensor, None, None]:
    (codes_IT,) = ctx.saved_tensors
    codes_ITF = codes_IT.unsqueeze(-1).contiguous()
    ones = torch.ones(codes_ITF.shape, dtype=grad_TRD.dtype, device=grad_TRD.device)
    return gather_accumulate(codes_ITF, ones, grad_TRD.contiguous()), None, None


define(
    "bucket_sum(Tensor values, Tensor codes, int rows) -> Tensor",
    _bucket_sum,
    lambda values, codes, rows: values.new_empty(codes.shape[1], rows, values.shape[1]),
)
torch.library.register_autograd("nogemm::bucket_sum", _backward, setup_context=_setup_context, lib=LIBRARY)
