"""Comparisons with bounds derived from float64 references, not magic tolerances.

The rounding model: a sum of n products computed in a dtype of unit roundoff u differs from the exact one by at most
about n u sum|a||b| (Higham's gamma_n), whatever the order; storing the result costs another u |y|. Each check takes the
float64 value and the float64 sum of magnitudes, and states how many roundings lie on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
