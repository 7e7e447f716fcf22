"""The largest logit of a vocabulary head, found in a fraction of the head's bytes, and proven.

Every row of the head has a short code: its coordinates in a basis in which the leading ones carry most of a logit, the
leading ones in int8, the others in four bits. Codes give an estimate of each logit and a bound on its error. A row
whose upper bound is below the best lower bound cannot win; the others, some dozens, are computed exactly.

Legend: N tokens, D width, V rows (vocabulary), G groups of 64 rows, K leading coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nogemm.errors import ConfigError, ShapeError
from nogemm.ops._library import define
from nogemm.ops.packed_hire import read_sketch

OVERFLOWN = -2  # the native kernel's index of a state whose bounds are beyond float32


@dataclass(frozen=True)
class HeadCodes:
    """What estimates the logits of a head; made by `nogemm.heads.make_codes`.

    Attributes:
        project: float32 [D, D], T: a state x has the coordinates y = T x.
        mean: float32 [D], the mean row, which codes leave out: it shifts all logits of a state alike.
        eight: uint8 [G, ceil(K / 4), 64, 4], codes of the leading coordinates plus 128.
        four: uint8 [G, ceil((D - K) / 8), 64, 4], codes of the others plus 8: of each byte the low half belongs to the
            first four columns of a step, the high half to the other four.
        numbers: bfloat16 [G, 4, 64], of each row the two scales, then the lengths of what rounding took off.
        limits: float32 [6], over all rows: longest row of each part, longest row of the head, Frobenius norm of T,
            largest |bias|, length of `mean`.
    """

    project: Tensor
    mean: Tensor
    eight: Tensor
    four: Tensor
    numbers: Tensor
    limits: Tensor

    @property
    def bytes(self) -> int:
        """Bytes that all of it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors in the order of the operator's arguments."""
        return tuple(getattr(self, field.name) for field in fields(self))


def head_logits_reference(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Multiply in float32; see `head_logits`."""
    logits_NV = x_ND.float() @ weight_VD.float().T
    return logits_NV if bias_V is None else logits_NV + bias_V.float()


def head_logits(x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Compute all logits of a head: what `head_argmax` is exact to.

        logit[n, v] = sum_d x[n, d] weight[v, d] + bias[v]

    Args:
        x_ND: any floating dtype, read as float32.
        weight_VD: float32, bfloat16 or float16, as stored.
        bias_V: float32.
    Returns:
        float32 [N, V], accumulated in float32 in an order that depends on D alone.
    Raises:
        ShapeError: the widths disagree.
    Cost: 2 N V D FLOP; the weights are read once.
    """
    _check(x_ND, weight_VD, "head_logits")
    return torch.ops.nogemm.head_logits(x_ND.float(), weight_VD, bias_V)


def head_argmax_reference(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    project_DD: Tensor,
    mean_D: Tensor,
    eight: Tensor,
    four: Tensor,
    numbers_G4R: Tensor,
    limits: Tensor,
    share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate, bound, keep what may win, compare exactly; see `head_argmax`. The estimates are made in float64."""
    rows, leading = weight_VD.shape[0], min(eight.shape[1] * 4, x_ND.shape[1])
    y_ND = x_ND.double() @ project_DD.double().T
    scale8, scale4, error8, error4 = numbers_G4R.double().permute(1, 0, 2).flatten(1)[:, :rows]
    estimate = (x_ND.double() @ mean_D.double()).unsqueeze(1)
    bound = torch.zeros_like(estimate)
    parts = ((y_ND[:, :leading], eight, False, scale8, error8), (y_ND[:, leading:], four, True, scale4, error4))
    for y, codes, nibbles, scale, error in parts:
        row_VC = read_sketch(codes, nibbles)[:rows, : y.shape[1]] * scale.unsqueeze(1)
        estimate = estimate + y @ row_VC.T
        bound = bound + share * y.norm(dim=1, keepdim=True) * error
    logits_NV = head_logits_reference(x_ND, weight_VD, bias_V)
    if bias_V is not None:
        estimate = estimate + bias_V.double()
    floor_N1 = (estimate - bound).amax(1, keepdim=True)
    may_win_NV = estimate + bound >= floor_N1
    logits_NV = logits_NV.masked_fill(~may_win_NV, -torch.inf)
    value_N = logits_NV.amax(1)
    index_N = (logits_NV == value_N.unsqueeze(1)).int().argmax(1)  # the lowest
    finite_N = x_ND.isfinite().all(1)
    return (
        torch.where(finite_N, index_N, -1),
        torch.where(finite_N, value_N, torch.nan),
        torch.where(finite_N, may_win_NV.sum(1), 0),
    )


def head_argmax(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, codes: HeadCodes, *, share: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the row with the largest logit without reading the head.

        index[n] = argmax_v x[n] . weight[v] + bias[v],  ties to the lowest v

    The answer is proven: |logit - estimate| <= |y8| e8 + |y4| e4 by Cauchy and Schwarz, where e are the lengths of what
    rounding took off a row, plus what float32 may lose. So it equals the argmax of `head_logits` for any codes; poor
    ones only leave more rows to compute.

    Args:
        x_ND: states, any floating dtype, read as float32.
        weight_VD: float32, bfloat16 or float16; bias_V float32.
        codes: of these weights, by `nogemm.heads.make_codes`.
        share: of the bound that counts. Below 1 nothing is proven any more, and fewer rows are computed.
    Returns:
        index int64 [N], its logit float32 [N], and how many rows were computed exactly, int64 [N]. A state that is not
        finite, or has a logit that is NaN, has index -1 and logit NaN.
    Raises:
        ShapeError: shapes disagree. ConfigError: share is not between 0 and 1.
    Cost: about D / 2 + K / 2 + 8 bytes a row, once for up to 16 tokens, and the rows that are left.
    Source: HiRE (2024) for sketch and exact rows; the proof and the codes are ours.
    """
    _check(x_ND, weight_VD, "head_argmax")
    if not 0 <= share <= 1:
        raise ConfigError(f"head_argmax: share must be from 0 to 1, got {share}")
    index, value, rows = torch.ops.nogemm.head_argmax(x_ND.float(), weight_VD, bias_V, *codes.tensors(), float(share))
    if len(index) and int(index.min()) == OVERFLOWN:
        _all_rows(x_ND, weight_VD, bias_V, index, value, rows)
    return index, value, rows


def _all_rows(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, index_N: Tensor, value_N: Tensor, rows_N: Tensor
) -> None:
    """Answer by all logits, in place, where bounds overflowed float32; a logit that is NaN leaves no answer."""
    for n in (index_N == OVERFLOWN).nonzero().flatten().tolist():
        logits = head_logits(x_ND[n : n + 1], weight_VD, bias_V)[0]
        if bool(logits.isnan().any()):
            value_N[n], index_N[n], rows_N[n] = torch.nan, -1, 0
            continue
        value_N[n], rows_N[n] = logits.max(), len(logits)
        index_N[n] = int((logits == logits.max()).int().argmax())


def _check(x_ND: Tensor, weight_VD: Tensor, caller: str) -> None:
    if x_ND.dim() != 2 or weight_VD.dim() != 2 or x_ND.shape[1] != weight_VD.shape[1]:
        raise ShapeError(
            f"{caller}: expected x [N, D] and weight [V, D], got x {tuple(x_ND.shape)} and weight "
            f"{tuple(weight_VD.shape)}"
        )


define(
    "head_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    head_logits_reference,
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32),
)
define(
    "head_argmax(Tensor x, Tensor weight, Tensor? bias, Tensor project, Tensor mean, Tensor eight, Tensor four, "
    "Tensor numbers, Tensor limits, float share) -> (Tensor, Tensor, Tensor)",
    head_argmax_reference,
    lambda x, *rest: (
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(x.shape[0], dtype=torch.int64),
    ),
)
