"""Compare a contender's output with its reference before it may be timed.

Two errors, both relative to the reference's root-mean-square token norm: over all tokens (rms_error) and of the worst
token (max_error). The second catches one wrong row, which the first would drown.

Legend: N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHECKED_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Bound:
    """Say how far an output may be from its reference.

    Attributes:
        rms: largest rms_error.
        token: largest error of a token.
        share: part of the tokens that may exceed `token` (a hashed bit whose value is nearly zero may differ between
            two exact computations); one token of any number checked is always allowed if this is above zero.
        outlier: largest error of those.
    """

    rms: float
    token: float
    share: float = 0.0
    outlier: float = 0.0


# fp32: sums of a few thousand terms in any order. bf16: 8 bits of precision in weights, inputs and hidden values.
# int8: steps of 1/127 of the largest weight and of the largest activation, calibrated or not.
DENSE_BOUNDS = {
    "fp32": Bound(rms=1e-4, token=1e-3),
    "bf16": Bound(rms=2e-2, token=6e-2),
    "int8": Bound(rms=1e-1, token=4e-1),
}


def token_errors(y_ND: Tensor, reference_ND: Tensor) -> Tensor:
    """Return |y_n - r_n| / rms_n |r_n| for each token, float64 [N]; |y_n| where the reference is all zeros."""
    wide = reference_ND.double()
    scale = wide.square().sum(-1).mean().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return (y_ND.double() - wide).norm(dim=-1) / scale


def compare(y_ND: Tensor, reference_ND: Tensor, bound: Bound) -> dict[str, Any]:
    """Compare outputs with the reference.

    Returns:
        {"verified", "max_error", "rms_error"} and, where they differ too much, "error" that says how.
    """
    if y_ND.shape != reference_ND.shape:
        return _refuse(f"output has shape {tuple(y_ND.shape)}, the reference {tuple(reference_ND.shape)}")
    if not torch.isfinite(y_ND).all():
        return _refuse("output is not finite")
    errors = token_errors(y_ND, reference_ND)
    if not torch.isfinite(errors).all():
        return _refuse("the reference is not finite")
    facts = {"verified": True, "max_error": float(errors.max()), "rms_error": float(errors.square().mean().sqrt())}
    beyond = errors > bound.token
    allowed = max(1.0, bound.share * len(errors)) if bound.share > 0 else 0.0
    if facts["rms_error"] > bound.rms:
        reason = f"rms error {facts['rms_error']:.2g} exceeds {bound.rms:.2g}"
    elif int(beyond.sum()) > allowed:
        reason = f"{int(beyond.sum())} of {len(errors)} tokens differ by more than {bound.token:.2g}"
    elif bool((errors > max(bound.outlier, bound.token)).any()):
        reason = f"a token differs by {facts['max_error']:.2g}, more than {max(bound.outlier, bound.token):.2g}"
    else:
        return facts
    return facts | {"verified": False, "error": f"does not match the reference: {reason}"}


def some_rows(count: int) -> Tensor:
    """Choose at most 256 rows spread evenly over `count`, the first and the last among them."""
    if count <= CHECKED_TOKENS:
        return torch.arange(count)
    return torch.linspace(0, count - 1, CHECKED_TOKENS).round().long()


def _refuse(reason: str) -> dict[str, Any]:
    return {"verified": False, "error": f"does not match the reference: {reason}"}
