"""The largest logit of a vocabulary head, found in a fraction of the head's bytes, and proven.

Every row of the head has a short code: its coordinates in a basis in which the leading ones carry most of a logit, the
leading ones in int8, the others in four bits. Codes give an estimate of each logit and a bound on its error. A row
whose upper bound is below the best lower bound cannot win; the others, some dozens, are computed exactly.
`head_search` finds it without a proof, in fewer bytes.

Legend: N tokens, D width, V rows (vocabulary), G groups of 64 rows, K leading coordinates,
S coordinates that a search reads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nogemm.config import check_int
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
        four: uint8 [G, ceil((S - K) / 8), 64, 4], codes of the next coordinates plus 8: of each byte the low half
            belongs to the first four columns of a step, the high half to the other four.
        rest: uint8 [G, ceil((D - S) / 8), 64, 4], codes of the others, likewise; a search leaves them out.
        numbers: bfloat16 [G, 4, 64], of each row the two scales, then the lengths of what rounding took off.
        limits: float32 [6], over all rows: longest row of each part, longest row of the head, Frobenius norm of T,
            largest |bias|, length of `mean`.
    """

    project: Tensor
    mean: Tensor
    eight: Tensor
    four: Tensor
    rest: Tensor
    numbers: Tensor
    limits: Tensor

    @property
    def bytes(self) -> int:
        """Bytes that all of it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    @property
    def search_bytes(self) -> int:
        """Bytes of what a search reads."""
        return self.bytes - self.rest.numel()

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


def head_estimates_reference(
    x_ND: Tensor, bias_V: Tensor | None, noise_NV: Tensor | None, codes: HeadCodes, rows: int, coordinates: int
) -> tuple[Tensor, Tensor]:
    """Estimate logits from leading coordinates; return float64 [N, V], and how far each may be off before rounding."""
    y_ND = x_ND.double() @ codes.project.double().T
    scale8, scale4, error8, error4 = codes.numbers.double().permute(1, 0, 2).flatten(1)[:, :rows]
    leading = min(codes.eight.shape[1] * 4, y_ND.shape[1])
    row_VD = torch.cat(
        (
            read_sketch(codes.eight, False)[:rows, :leading] * scale8.unsqueeze(1),
            read_sketch(codes.four, True)[:rows] * scale4.unsqueeze(1),
            read_sketch(codes.rest, True)[:rows] * scale4.unsqueeze(1),
        ),
        1,
    )[:, :coordinates]
    estimate = (x_ND.double() @ codes.mean.double()).unsqueeze(1) + y_ND[:, :coordinates] @ row_VD.T
    for added in (bias_V, noise_NV):
        estimate = estimate if added is None else estimate + added.double()
    bound = y_ND[:, :leading].norm(dim=1, keepdim=True) * error8 + y_ND[:, leading:].norm(dim=1, keepdim=True) * error4
    return estimate, bound


def head_argmax_reference(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, noise_NV: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate, bound, keep what may win, compare exactly; see `head_argmax`. The estimates are made in float64."""
    *tensors, share = rest
    estimate, bound = head_estimates_reference(x_ND, bias_V, noise_NV, HeadCodes(*tensors), *weight_VD.shape)
    bound = share * bound
    logits_NV = head_logits_reference(x_ND, weight_VD, bias_V)
    if noise_NV is not None:
        logits_NV = logits_NV + noise_NV
    may_win_NV = estimate + bound >= (estimate - bound).amax(1, keepdim=True)
    index_N, value_N = _lowest_best(logits_NV.masked_fill(~may_win_NV, -torch.inf), x_ND)
    return index_N, value_N, torch.where(index_N < 0, 0, may_win_NV.sum(1))


def head_argmax(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    codes: HeadCodes,
    *,
    noise_NV: Tensor | None = None,
    share: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the row with the largest logit without reading the head.

        index[n] = argmax_v x[n] . weight[v] + bias[v] + noise[n, v],  ties to the lowest v

    The answer is proven: |logit - estimate| <= |y8| e8 + |y4| e4 by Cauchy and Schwarz, where e are the lengths of what
    rounding took off a row, plus what float32 may lose. So it equals the argmax of `head_logits` for any codes; poor
    ones only leave more rows to compute.

    Args:
        x_ND: states, any floating dtype, read as float32.
        weight_VD: float32, bfloat16 or float16; bias_V float32.
        codes: of these weights, by `nogemm.heads.make_codes`.
        noise_NV: float32, added to the logits of each state; with Gumbel noise the answer is a sample.
        share: of the bound that counts. Below 1 nothing is proven any more, and fewer rows are computed.
    Returns:
        index int64 [N], its logit with the noise, float32 [N], and how many rows were computed exactly, int64 [N]. A
        state that is not finite, or has a logit that is NaN, has index -1 and logit NaN.
    Raises:
        ShapeError: shapes disagree. ConfigError: share is not between 0 and 1.
    Cost: about D / 2 + K / 2 + 8 bytes a row, once for up to 16 tokens, and the rows that are left.
    Source: HiRE (2024) for sketch and exact rows; the proof and the codes are ours.
    """
    _check(x_ND, weight_VD, "head_argmax", noise_NV)
    if not 0 <= share <= 1:
        raise ConfigError(f"head_argmax: share must be from 0 to 1, got {share}")
    index, value, rows = torch.ops.nogemm.head_argmax(
        x_ND.float(), weight_VD, bias_V, noise_NV, *codes.tensors(), float(share)
    )
    _answer_overflown(x_ND, weight_VD, bias_V, noise_NV, index, value, rows=rows)
    return index, value, rows


def head_search_reference(
    x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, noise_NV: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate, take the best rows, compare exactly; see `head_search`. The estimates are made in float64."""
    *tensors, rows, logits = rest
    codes = HeadCodes(*tensors)
    count, width = weight_VD.shape
    seen = width if logits else min(width, codes.eight.shape[1] * 4 + codes.four.shape[1] * 8)
    estimate, _ = head_estimates_reference(x_ND, bias_V, noise_NV, codes, count, seen)
    found = estimate.nan_to_num(nan=-torch.inf).topk(min(rows, count), 1).indices
    exact_NV = head_logits_reference(x_ND, weight_VD, bias_V)
    if noise_NV is not None:
        exact_NV = exact_NV + noise_NV
    kept = torch.zeros_like(exact_NV, dtype=torch.bool).scatter_(1, found, True)
    index_N, value_N = _lowest_best(exact_NV.masked_fill(~kept, -torch.inf), x_ND)
    all_NV = torch.where(kept, exact_NV, estimate.float()) if logits else exact_NV[:, :0]
    return index_N, value_N, all_NV.contiguous()


def head_search(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    codes: HeadCodes,
    rows: int,
    *,
    noise_NV: Tensor | None = None,
    logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the row with the largest logit among those that the codes rank first.

        R = the rows with the largest estimates,  index[n] = argmax_{v in R} x[n] . weight[v] + bias[v] + noise[n, v]

    Args:
        x_ND, weight_VD, bias_V, codes, noise_NV: as in `head_argmax`.
        rows: of R; of equal estimates the lowest rows.
        logits: False: estimates are made of the first S coordinates. True: of all, and all logits are returned.
    Returns:
        index int64 [N], its exact logit with the noise, float32 [N], and logits float32 [N, V]: exact for R, estimates
        for all others, noise included; [N, 0] if they were not asked for. What has no answer is as in `head_argmax`,
        with logits that are NaN.
    Raises:
        ShapeError: shapes disagree. ConfigError: rows is below 1.
    Cost: about S / 2 + K / 2 + 4 bytes a row, or with logits D / 2 + K / 2 + 4, and R.
    Source: HiRE (2024).
    """
    _check(x_ND, weight_VD, "head_search", noise_NV)
    check_int("head_search", "rows", rows, 1)
    index, value, all_NV = torch.ops.nogemm.head_search(
        x_ND.float(), weight_VD, bias_V, noise_NV, *codes.tensors(), rows, logits
    )
    _answer_overflown(x_ND, weight_VD, bias_V, noise_NV, index, value, logits=all_NV if logits else None)
    return index, value, all_NV


def _lowest_best(logits_NV: Tensor, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    value_N = logits_NV.amax(1)
    index_N = (logits_NV == value_N.unsqueeze(1)).int().argmax(1)
    finite_N = x_ND.isfinite().all(1)
    return torch.where(finite_N, index_N, -1), torch.where(finite_N, value_N, torch.nan)


def _answer_overflown(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    noise_NV: Tensor | None,
    index_N: Tensor,
    value_N: Tensor,
    *,
    rows: Tensor | None = None,
    logits: Tensor | None = None,
) -> None:
    """Answer by all logits, in place, where bounds overflowed float32; a logit that is NaN leaves no answer."""
    if not len(index_N) or int(index_N.min()) >= 0:
        return
    for n in (index_N < 0).nonzero().flatten().tolist():
        own = head_logits(x_ND[n : n + 1], weight_VD, bias_V)[0]
        own = own if noise_NV is None else own + noise_NV[n]
        if logits is not None:
            logits[n] = own if int(index_N[n]) == OVERFLOWN else torch.nan
        if int(index_N[n]) != OVERFLOWN:
            continue
        broken = bool(own.isnan().any())
        value_N[n] = torch.nan if broken else own.max()
        index_N[n] = -1 if broken else int((own == own.max()).int().argmax())
        if rows is not None:
            rows[n] = 0 if broken else len(own)


def _check(x_ND: Tensor, weight_VD: Tensor, caller: str, noise_NV: Tensor | None = None) -> None:
    if x_ND.dim() != 2 or weight_VD.dim() != 2 or x_ND.shape[1] != weight_VD.shape[1]:
        raise ShapeError(
            f"{caller}: expected x [N, D] and weight [V, D], got x {tuple(x_ND.shape)} and weight "
            f"{tuple(weight_VD.shape)}"
        )

    if noise_NV is not None and tuple(noise_NV.shape) != (len(x_ND), len(weight_VD)):
        raise ShapeError(f"{caller}: noise must be [N, V] = {[len(x_ND), len(weight_VD)]}, got {tuple(noise_NV.shape)}")


define(
    "head_logits(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    head_logits_reference,
    lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32),
)
_CODES = "Tensor project, Tensor mean, Tensor eight, Tensor four, Tensor rest, Tensor numbers, Tensor limits"
_HEAD = f"Tensor x, Tensor weight, Tensor? bias, Tensor? noise, {_CODES}"


def _fake_answer(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=torch.float32)


define(
    f"head_argmax({_HEAD}, float share) -> (Tensor, Tensor, Tensor)",
    head_argmax_reference,
    lambda x, *rest: (*_fake_answer(x), x.new_empty(x.shape[0], dtype=torch.int64)),
)
define(
    f"head_search({_HEAD}, int rows, bool logits) -> (Tensor, Tensor, Tensor)",
    head_search_reference,
    lambda x, weight, *rest: (
        *_fake_answer(x),
        x.new_empty((x.shape[0], weight.shape[0] if rest[-1] else 0), dtype=torch.float32),
    ),
)
