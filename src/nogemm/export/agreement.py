"""How far an exported file agrees with the packed torch model, and how far it has to.

Legend: B texts, L tokens per text, D width of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nogemm.errors import NogemmError


@dataclass(frozen=True)
class Agreement:
    """The mean over all texts that were compared, and the worst of them; 1 is equal."""

    mean: float
    worst: float


# Least agreement by (rest, rows). Float is rounding alone, 24 bits through some hundred sums; but where a layer chooses
# rows or neurons, a token near an edge may choose another: in MiniLM 1 to seven digits with LookupFFN, 0.9995 and 0.996
# at worst with HireFFN. Rows of fewer bits come with projections in fixed point, where a step of 2^-15 may go either
# way and more tokens choose otherwise: 0.997 and 0.994. An int8 rest moves every token by about a hundredth: 0.997 and
# 0.991 with dense FFNs, 0.978 and 0.959 with HireFFN.
_LEAST = {
    ("float", "fp32"): Agreement(0.999, 0.98),
    ("float", "bf16"): Agreement(0.99, 0.9),
    ("float", "int8"): Agreement(0.99, 0.9),
    ("int8", "fp32"): Agreement(0.93, 0.85),
    ("int8", "bf16"): Agreement(0.93, 0.85),
    ("int8", "int8"): Agreement(0.93, 0.85),
}


def agreement(found: Sequence[Tensor], expected: Sequence[Tensor], masks: Sequence[Tensor]) -> Agreement:
    """Compare outputs batch by batch; padding is left out where an output has a row per token.

        a_b = 1 - mean_l |y_bl - r_bl|^2 / (2 s^2),  s^2 = the mean of |r_bl|^2 over all texts and tokens

    For vectors of one length this is their cosine; unlike a cosine it sees a wrong length, and it holds for a single
    logit, whose cosine is 1 or -1.

    Args:
        found, expected: [B, L, D] or [B, D] of each batch.
        masks: [B, L], 1 where there is a token.
    """
    errors, sizes = [], []
    for y, r, mask in zip(found, expected, masks, strict=True):
        if y.shape != r.shape:
            raise NogemmError(f"export: the file's output has shape {tuple(y.shape)}, torch's {tuple(r.shape)}")
        weight = mask.double() if r.dim() == 3 and r.shape[:2] == mask.shape else torch.ones(r.shape[:-1]).double()
        axes = tuple(range(1, weight.dim()))

        def mean(x: Tensor, weight: Tensor = weight, axes: tuple[int, ...] = axes) -> Tensor:
            squares = x.double().square().sum(-1) * weight
            return squares.sum(axes) / weight.sum(axes) if axes else squares

        errors.append(mean(torch.where(weight.bool().unsqueeze(-1), y - r, 0.0)))
        sizes.append(mean(torch.where(weight.bool().unsqueeze(-1), r, 0.0)))
    close = 1 - torch.cat(errors) / (2 * torch.cat(sizes).mean().clamp_min(1e-30))
    return Agreement(float(close.mean()), float(close.min()))


def check_agreement(found: Agreement, rest: str, rows: str) -> None:
    """Refuse a file that computes something else.

    Raises:
        NogemmError: the mean or the worst text is below what these precisions leave.
    """
    least = _LEAST[rest, rows]
    if not (found.mean >= least.mean and found.worst >= least.worst):  # false for NaN too
        raise NogemmError(
            f"export: the file computes something else than the packed torch model (agreement {found.mean:.4f}, "
            f"{least.mean} needed; worst text {found.worst:.4f}, {least.worst} needed); nothing was written"
        )
