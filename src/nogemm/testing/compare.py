"""Comparisons with bounds derived from float64 references, not magic tolerances.

The rounding model: a sum of n products computed in a dtype of unit roundoff u differs from the exact one by at most
about n u sum|a||b| (Higham's gamma_n), whatever the order; storing the result costs another u |y|. Each check takes the
float64 value and the float64 sum of magnitudes, and states how many roundings lie on the way.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nogemm.layers import LookupFFN
from nogemm.ops import gather_accumulate_reference, hash_codes_reference


class Mismatch(AssertionError):
    """A result lies outside the bound that its reference allows."""


@dataclass(frozen=True)
class Closeness:
    """How close a result came: the largest error, and the largest error as a share of its bound."""

    max_error: float
    share_of_bound: float


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return half the distance from 1 to the next number of `dtype`."""
    return torch.finfo(dtype).eps / 2


def check_sum(
    name: str,
    actual: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    terms: int,
    *,
    accumulate: torch.dtype = torch.float32,
) -> Closeness:
    """Compare sums of products with their float64 values.

        |actual - exact| <= (terms + 2) u_accumulate magnitude + 2 u_stored |exact| + smallest normal number

    Args:
        actual: the result under test, stored in its own dtype.
        exact: float64 reference.
        magnitude: float64 sum of the absolute values of what was added.
        terms: additions on the longest way to one output.
        accumulate: dtype of the running sum.
    Raises:
        Mismatch: outside the bound, not finite where the reference is, or of another shape.
    """
    if actual.shape != exact.shape:
        raise Mismatch(f"{name}: shape {tuple(actual.shape)}, reference {tuple(exact.shape)}")
    if actual.numel() == 0:
        return Closeness(0.0, 0.0)
    stored = unit_roundoff(actual.dtype)
    tiny = torch.finfo(torch.float32).tiny
    bound = (terms + 2) * unit_roundoff(accumulate) * magnitude + 2 * stored * exact.abs() + tiny
    error = (actual.double() - exact).abs()
    same_special = (actual.isnan() & exact.isnan()) | (actual.double() == exact)
    share = torch.where(same_special, 0.0, torch.nan_to_num(error / bound, nan=float("inf")))
    worst = int(share.argmax())
    closeness = Closeness(float(torch.where(same_special, 0.0, error).flatten()[worst]), float(share.max()))
    if closeness.share_of_bound > 1.0:
        raise Mismatch(
            f"{name}: at flat index {worst} got {actual.flatten()[worst].item():.9g}, reference "
            f"{exact.flatten()[worst].item():.9g}: {closeness.share_of_bound:.3g} times the bound"
        )
    return closeness


def check_equal(name: str, actual: Tensor, expected: Tensor) -> None:
    """Demand equal bits (NaN equals NaN): for codes, gathers of whole numbers, and repeated runs.

    Raises:
        Mismatch: any difference in shape, dtype or value.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise Mismatch(
            f"{name}: {actual.dtype} {tuple(actual.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
        )
    same = (actual == expected) | (actual.isnan() & expected.isnan() if actual.is_floating_point() else False)
    if not bool(torch.as_tensor(same).all()):
        wrong = int((~same).sum())
        first = int((~same).flatten().int().argmax())
        raise Mismatch(
            f"{name}: {wrong} of {actual.numel()} values differ, first at flat index {first}: "
            f"{actual.flatten()[first].item()} instead of {expected.flatten()[first].item()}"
        )


def undecided_bits(z_NM: Tensor, magnitude_NM: Tensor, dtype: torch.dtype) -> Tensor:
    """Mark the soft bits whose sign rounding may change: |z| <= 8 eps sum|w||x|, eps of `dtype`.

    Args:
        z_NM, magnitude_NM: float64 soft bits and the sums of magnitudes behind them.
    """
    return z_NM.abs() <= 8 * torch.finfo(dtype).eps * magnitude_NM


def check_lookup(name: str, layer: LookupFFN, y_ND: Tensor, x_ND: Tensor, *, slack: float = 4.0) -> float:
    """Hold another form of a float32 LookupFFN (packed, another instruction set) against float64.

    A token's error may be `slack` times the worst error of the unpacked layer itself. A token beyond that is accepted
    only if a soft bit of it lies within rounding of zero, and then only against the better of the neighbouring codes.

    Args:
        layer: the unpacked layer, float32.
        y_ND: what the other form answered for x_ND.
    Returns:
        The share of tokens that needed a neighbouring code.
    Raises:
        Mismatch: a token is explained by neither.
    """
    if x_ND.shape[0] == 0:
        return 0.0
    with torch.no_grad():
        exact = copy.deepcopy(layer).double()
        x = x_ND.double()
        hashed = x if exact.norm is None else exact.norm(x)
        z_NM = exact.projection(hashed)
        matrix_MD, bias_M = exact.projection.dense_matrix(), exact.projection.bias
        magnitude_NM = hashed.abs() @ matrix_MD.abs().T + (0.0 if bias_M is None else bias_M.abs())
        near_NM = undecided_bits(z_NM, magnitude_NM, torch.float32)
        expected = _from_soft_bits(exact, z_NM)
        size = expected.abs().amax().clamp_min(1e-30)
        plain = (layer(x_ND).double() - expected).abs().amax(-1)
        # The unpacked layer has flips of its own; they must not widen what is allowed.
        bound = slack * float(plain[~near_NM.any(-1)].max() if bool((~near_NM.any(-1)).any()) else 0.0)
        bound += 16 * unit_roundoff(torch.float32) * float(size)
        errors = (y_ND.double() - expected).abs().amax(-1)
        beyond = torch.nonzero(~(errors <= bound)).flatten().tolist()
        for n in beyond:
            best = min(float((y_ND[n].double() - y).abs().max()) for y in _neighbours(exact, z_NM[n], near_NM[n]))
            if not best <= bound:
                raise Mismatch(f"{name}: token {n} is off by {float(errors[n]):.3g}, allowed {bound:.3g}")
        return len(beyond) / x_ND.shape[0]


def _from_soft_bits(layer: LookupFFN, z_NM: Tensor) -> Tensor:
    config = layer.config
    codes, scores = hash_codes_reference(z_NM, config.bits, config.neighbours, config.score == "gelu")
    y_ND = gather_accumulate_reference(codes, scores, layer.stored_rows())
    return y_ND if layer.bias is None else y_ND + layer.bias


def _neighbours(layer: LookupFFN, z_M: Tensor, near_M: Tensor) -> Iterator[Tensor]:
    """Yield the outputs for every choice of the undecided bits (the four nearest zero, if there are more)."""
    candidates = torch.nonzero(near_M).flatten().tolist()
    bits = sorted(candidates, key=lambda j: abs(float(z_M[j])))[:4]
    for flips in itertools.product((1.0, -1.0), repeat=len(bits)):
        z = z_M.clone()
        for j, sign in zip(bits, flips, strict=True):
            z[j] = sign * max(abs(float(z_M[j])), 1e-300)
        yield _from_soft_bits(layer, z.unsqueeze(0))[0]
