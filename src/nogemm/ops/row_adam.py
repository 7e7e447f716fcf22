"""One Adam step for some rows of a matrix, each with its own arrears.

Legend: R rows of the matrix, D width, V rows that are stepped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.errors import ShapeError
from nogemm.ops._library import define, native_available


def row_adam_reference(
    param: Tensor,
    mean: Tensor,
    square: Tensor,
    index: Tensor,
    grad: Tensor,
    arrears: Tensor,
    beta1: float,
    beta2: float,
    step: float,
    root: float,
    eps: float,
    keep: float,
) -> None:
    """Step the rows in place, all at once; see `row_adam`."""
    rows_V = index.long()
    param, mean, square = (t.view(-1, t.shape[-1]) for t in (param, mean, square))
    shrink, drift, fade1, fade2 = arrears.to(param.dtype).unsqueeze(-1).unbind(1)
    p, m, v = param[rows_V], mean[rows_V], square[rows_V]
    p = p * shrink - drift * m / (v.sqrt() + eps)
    m = fade1 * m + (1.0 - beta1) * grad
    v = fade2 * v + (1.0 - beta2) * grad.square()
    mean[rows_V], square[rows_V] = m, v
    param[rows_V] = keep * p - step * m / (v.sqrt() * root + eps)


def row_adam(
    param_RD: Tensor,
    mean_RD: Tensor,
    square_RD: Tensor,
    index_V: Tensor,
    grad_VD: Tensor,
    arrears_V4: Tensor,
    *,
    beta1: float,
    beta2: float,
    step: float,
    root: float,
    eps: float,
    keep: float,
) -> None:
    """Catch up with what some rows missed, then step them, in place.

        p <- shrink p - drift m / (sqrt(v) + eps);   m <- fade1 m + (1 - beta1) g;   v <- fade2 v + (1 - beta2) g^2
        p <- keep p - step m / (root sqrt(v) + eps)

    Args:
        param_RD, mean_RD, square_RD: leading dimensions are flattened; contiguous.
        index_V: int32 rows, none of them twice.
        arrears_V4: float32 (shrink, drift, fade1, fade2) of each row; (1, 0, beta1, beta2) if it missed nothing.
        step, root: the rate divided by 1 - beta1^t, and 1 / sqrt(1 - beta2^t).
        keep: 1 - rate * weight decay.
    Raises:
        ShapeError: shapes disagree. IndexError: a row outside the matrix.
    Cost: reads 4 V D and writes 3 V D numbers.
    """
    shape = (index_V.shape[0], param_RD.shape[-1])
    alike = param_RD.shape == mean_RD.shape == square_RD.shape
    if not alike or grad_VD.shape != shape or arrears_V4.shape != (shape[0], 4):
        raise ShapeError(
            f"row_adam: param {tuple(param_RD.shape)}, index {tuple(index_V.shape)}, grad {tuple(grad_VD.shape)} and "
            f"arrears {tuple(arrears_V4.shape)} disagree"
        )
    tensors = (param_RD, mean_RD, square_RD)
    plain = all(t.dtype == torch.float32 and t.is_contiguous() and t.device.type == "cpu" for t in tensors)
    call = torch.ops.nogemm.row_adam_ if native_available() and plain else row_adam_reference
    call(*tensors, index_V, grad_VD, arrears_V4, beta1, beta2, step, root, eps, keep)


define(
    "row_adam_(Tensor(a!) param, Tensor(b!) mean, Tensor(c!) square, Tensor index, Tensor grad, Tensor arrears, "
    "float beta1, float beta2, float step, float root, float eps, float keep) -> ()",
    row_adam_reference,
    lambda *_: None,
)
