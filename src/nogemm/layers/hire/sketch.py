"""The cheap copy of a HireFFN's first matrix that says which neurons are worth computing.

Legend: N tokens, D width, F neurons, R width of the sketch (D, or the rank), L levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nogemm.ops.sketch_and_select import quantise_tokens, sketch_scores

_MARGIN = 4.0  # standard deviations of the sketch's own noise, for selection by sign
_ROWS = 1024  # quantised at a time
# Shares of the largest weight at which int4 levels may end: clipping a few weights makes the steps finer for the rest.
_CLIPS = (1.0, 0.92, 0.85, 0.78, 0.72, 0.66, 0.6, 0.54, 0.48)


@dataclass(frozen=True)
class Sketch:
    """Quantised weights W ~ scale * codes (* reduce), and how far off they are.

    Attributes:
        codes_FR: int8; of an int4 sketch from -8 to 7.
        scale_F: float32.
        reduce_RD: float32, applied to tokens first; None for the quantised weights themselves.
        weight_FD: what was quantised.
    """

    codes_FR: Tensor
    scale_F: Tensor
    reduce_RD: Tensor | None
    weight_FD: Tensor

    def reduced(self, x_ND: Tensor) -> Tensor:
        """Return what the codes are multiplied with, float32 [N, R]."""
        wide = x_ND.float()
        return wide if self.reduce_RD is None else wide @ self.reduce_RD.T

    def scores(self, x_ND: Tensor, bias_F: Tensor | None) -> Tensor:
        """Estimate W x + bias, float32 [N, F]."""
        return sketch_scores(self.reduced(x_ND), self.codes_FR, self.scale_F, bias_F)

    def margins(self, x_ND: Tensor) -> Tensor:
        """Return how far an estimate may be below the truth, [N, F]: four standard deviations of the rounding noise.

        A row's error e meets a token as if the token's direction were random: |e| |x| / sqrt(D). Rounding the token to
        steps of s adds |w| s / sqrt(12).
        """
        _, step_N = quantise_tokens(self.reduced(x_ND))
        error_F, size_F = self.margin_factors(x_ND.shape[1])
        return torch.outer(x_ND.float().norm(dim=-1), error_F) + torch.outer(step_N, size_F)

    def margin_factors(self, width: int) -> tuple[Tensor, Tensor]:
        """Return what |x| and the token's step are multiplied with, both [F]."""
        rows = self.codes_FR.float() * self.scale_F.unsqueeze(-1)
        error = self.weight_FD.detach().float() - (rows if self.reduce_RD is None else rows @ self.reduce_RD)
        return error.norm(dim=-1) * (_MARGIN / width**0.5), rows.norm(dim=-1) * (_MARGIN / 12**0.5)


def quantise_neurons(rows_FR: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Round rows to integers with a scale each: 8 bits from -127 to 127, or 4 bits from -8 to 7.

    The 4-bit scale is the one of nine clipping points with the least squared error.

    Returns:
        codes int8 [F, R], scale float32 [F].
    """
    wide = rows_FR.detach().float()
    largest_F1 = wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if levels == 8:
        return (wide * (127.0 / largest_F1)).round().clamp(-127, 127).to(torch.int8), (largest_F1 / 127.0).squeeze(-1)
    codes, scales = [], []
    for start in range(0, wide.shape[0], _ROWS):
        rows, top = wide[start : start + _ROWS], largest_F1[start : start + _ROWS]
        steps = [top * (clip / 7.5) for clip in _CLIPS]
        errors = torch.stack([((rows / s).round().clamp(-8, 7) * s - rows).square().sum(-1) for s in steps])
        step = torch.cat(steps, 1).gather(1, errors.argmin(0).unsqueeze(1))
        codes.append((rows / step).round().clamp(-8, 7).to(torch.int8))
        scales.append(step.squeeze(-1))
    return torch.cat(codes), torch.cat(scales)


def low_rank_basis(weight_FD: Tensor, rank: int, moment_DD: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the r directions of the input that matter most to W x, in closed form.

    With E[x x^T] = M = L L^T and the leading right singular vectors V of W L, the map x -> L V (V^T L^-1 x) loses least
    of E |W x|^2 (an activation-whitened SVD; V comes from the D x D Gram matrix, not from W).

    Args:
        moment_DD: M; None for white inputs.
    Returns:
        reduce [r, D] = V^T L^-1 and lift [D, r] = L V, float32: W x ~ (W lift) (reduce x).
    Cost: O(F D^2 + D^3).
    """
    weight = weight_FD.detach().double()
    eye = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
    factor = eye
    if moment_DD is not None:
        moment = moment_DD.double()
        factor = torch.linalg.cholesky(moment + 1e-4 * moment.diagonal().mean().clamp_min(1e-12) * eye)
    weighted = weight @ factor
    _, vectors = torch.linalg.eigh(weighted.T @ weighted)
    leading_DR = vectors[:, -rank:].flip(1)
    reduce = torch.linalg.solve_triangular(factor.T, leading_DR, upper=True).T
    return reduce.float().contiguous(), (factor @ leading_DR).float().contiguous()


def make_sketch(weight_FD: Tensor, kind: str, reduce_RD: Tensor | None, lift_DR: Tensor | None) -> Sketch:
    """Build the sketch of W: "int8", "int4", or "low_rank" (W lift, rounded to int8)."""
    weight = weight_FD.detach().float()
    low_rank = kind == "low_rank" and reduce_RD is not None and lift_DR is not None
    rows = weight @ lift_DR.float() if low_rank and lift_DR is not None else weight
    codes, scale = quantise_neurons(rows, 4 if kind == "int4" else 8)
    return Sketch(codes, scale, reduce_RD.float() if low_rank and reduce_RD is not None else None, weight_FD)


def lists_of(mask_NF: Tensor) -> Tensor:
    """Turn a mask into lists of indices, int32 [N, most], increasing, padded with -1."""
    counts_N = mask_NF.sum(-1)
    most = int(counts_N.max()) if counts_N.numel() else 0
    order = mask_NF.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :most].to(torch.int32)
    places = torch.arange(most, device=mask_NF.device)
    return order.masked_fill(places >= counts_N.unsqueeze(-1), -1)
