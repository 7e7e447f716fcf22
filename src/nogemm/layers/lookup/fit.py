"""Closed-form fit of a LookupFFN's tables: with codes and scores fixed, the output is linear in them.

Legend: N tokens, D width, T tables, R rows per table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nogemm.errors import ConfigError, ShapeError
from nogemm.ops import gather_accumulate

if TYPE_CHECKING:
    from nogemm.layers.lookup.layer import LookupFFN

CHUNK = 8192  # tokens per call: bounds the codes' memory, not the result


def fit_tables(
    layer: LookupFFN, x_ND: Tensor, y_ND: Tensor, *, iterations: int = 30, ridge: float = 1e-3, tol: float = 1e-4
) -> float:
    """Solve for tables and bias by preconditioned conjugate gradients, the hash unchanged.

        min over tables, bias of  sum_n |y_n - bias - sum_t score * table[t, code]|^2 + ridge * c * |tables - start|^2

    c is the mean squared score mass of a row, so `ridge` has no unit. Starts from the present tables; every output
    dimension is its own least-squares problem with the same matrix, so all are solved at once.

    Args:
        x_ND: inputs of the layer.
        y_ND: what it should answer.
        iterations: at most this many gradient steps.
        tol: stop when the residual has fallen by this factor.
    Returns:
        The share of y's variance left unexplained, 1 - R^2.
    Raises:
        ConfigError: the tables are compressed.
        ShapeError: x and y disagree.
    Cost: per iteration one forward and one backward gather over all tokens; memory 4 copies of the tables.
    """
    if layer.config.storage != "fp32":
        raise ConfigError("fit_tables: the tables are compressed; decompress() the layer first")
    if x_ND.shape[0] != y_ND.shape[0] or x_ND.shape[0] == 0:
        raise ShapeError(
            f"fit_tables: x {tuple(x_ND.shape)} and y {tuple(y_ND.shape)} must have equal, non-zero tokens"
        )
    with torch.no_grad():
        problem = _Problem(layer, x_ND)
        target = y_ND.to(layer.tables.dtype)
        # A bias is free to take the mean, so both sides are centred and it is read off at the end.
        centred = target if layer.bias is None else target - target.mean(0)
        residual_ND = centred - problem.rows_to_tokens(layer.tables)
        penalty = ridge * problem.mass_TR.mean()
        scale_TR1 = 1.0 / (problem.mass_TR + penalty).unsqueeze(-1)
        gradient = problem.tokens_to_rows(residual_ND)
        solution = layer.tables.detach().clone()
        first = solution.clone()
        step = scale_TR1 * gradient
        direction = step.clone()
        energy_D = (gradient * step).sum((0, 1))
        goal = tol**2 * energy_D.sum()
        for _ in range(iterations):
            moved_ND = problem.rows_to_tokens(direction)
            curvature_D = moved_ND.square().sum(0) + penalty * direction.square().sum((0, 1))
            length_D = energy_D / curvature_D.clamp_min(1e-30)
            solution += length_D * direction
            residual_ND -= length_D * moved_ND
            gradient = problem.tokens_to_rows(residual_ND) - penalty * (solution - first)
            step = scale_TR1 * gradient
            energy_new_D = (gradient * step).sum((0, 1))
            direction = step + (energy_new_D / energy_D.clamp_min(1e-30)) * direction
            if energy_new_D.sum() <= goal:
                break
            energy_D = energy_new_D
        layer.tables.copy_(solution)
        if layer.bias is not None:
            layer.bias.copy_(target.mean(0) - problem.mean_token(solution))
        variance = (target - target.mean(0)).square().sum().clamp_min(1e-30)
        return (residual_ND.square().sum() / variance).item()


class _Problem:
    """The sparse design matrix as two products, rows -> tokens (centred if there is a bias) and its transpose."""

    def __init__(self, layer: LookupFFN, x_ND: Tensor) -> None:
        self.shape = layer.tables.shape
        self.centred = layer.bias is not None
        self.chunks: list[tuple[Tensor, Tensor]] = []
        for x in x_ND.to(layer.compute_dtype()).split(CHUNK):
            codes, scores = layer.codes_and_scores(x)
            self.chunks.append((codes, scores.contiguous()))
        ones = torch.ones(CHUNK, 1, dtype=layer.tables.dtype)
        mass = torch.zeros(*self.shape[:2], 1, dtype=layer.tables.dtype)
        for codes, scores in self.chunks:
            mass += _scatter(ones[: codes.shape[0]], codes, scores.square(), mass)
        self.mass_TR = mass.squeeze(-1)

    def rows_to_tokens(self, rows_TRD: Tensor) -> Tensor:
        y_ND = torch.cat([gather_accumulate(codes, scores, rows_TRD) for codes, scores in self.chunks])
        return y_ND - y_ND.mean(0) if self.centred else y_ND

    def mean_token(self, rows_TRD: Tensor) -> Tensor:
        return torch.cat([gather_accumulate(codes, scores, rows_TRD) for codes, scores in self.chunks]).mean(0)

    def tokens_to_rows(self, values_ND: Tensor) -> Tensor:
        out = torch.zeros(self.shape, dtype=values_ND.dtype)
        for (codes, scores), values in zip(self.chunks, values_ND.split(CHUNK), strict=True):
            out += _scatter(values, codes, scores, out)
        return out


def _scatter(values_ND: Tensor, codes: Tensor, scores: Tensor, like_TRD: Tensor) -> Tensor:
    return torch.ops.nogemm.gather_accumulate_backward(values_ND.contiguous(), codes, scores, like_TRD)[1]
