"""Start a TreeFFN from a dense layer and its activations: balanced splits, then least squares for the out-rows.

Legend: N tokens, D width, K trees, L levels, M nodes per tree, P = K L visited nodes per token, R = K M.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nogemm.activations import ACTIVATIONS
from nogemm.errors import ShapeError
from nogemm.layers.dense.config import DenseConfig
from nogemm.layers.dense.layer import DenseFFN
from nogemm.ops import neuron_sum
from nogemm.ops.neuron_rows import row_gradient

if TYPE_CHECKING:
    from nogemm.layers.tree.layer import TreeFFN

_FEWEST = 4  # tokens that a node needs before its split is fitted


def fit_tree(
    layer: TreeFFN, dense: DenseFFN, x_ND: Tensor, *, iterations: int = 30, ridge: float = 1e-2, tol: float = 1e-4
) -> float:
    """Fit the layer to a dense one on activations x; return the share of variance left unexplained, 1 - R^2.

    1. A core, if there is one, takes the dense layer's best neurons (`DenseFFN.fit_activations`).
    2. Every node's in-row becomes a random direction of large variance among the tokens that reach it, scaled to unit
       variance and, with a bias or a threshold, shifted to send half of them each way.
    3. min over out-rows and bias of sum_n |y_n - bias - sum_p fire_p row_p|^2 + ridge c |rows|^2, by preconditioned
       conjugate gradients; c is the mean squared firing of a visited node.

    Raises:
        ShapeError: no tokens, or of another width.
    Cost: 2 L passes over the tokens for the splits, and a forward and a backward of the layer per iteration.
    """
    if x_ND.dim() != 2 or x_ND.shape[0] == 0 or x_ND.shape[1] != layer.d_model:
        raise ShapeError(f"fit_tree: expected tokens [N, {layer.d_model}], got {tuple(x_ND.shape)}")
    with torch.no_grad():
        x_ND = x_ND.to(layer.compute_dtype())
        y_ND = dense.tokens(x_ND)
        variance = (y_ND - y_ND.mean(0)).square().sum().clamp_min(1e-30)
        if layer.core_out is not None:
            y_ND = y_ND - _fit_core(layer, dense, x_ND)
        fit_splits(layer, x_ND)
        return float(_fit_rows(layer, x_ND, y_ND, iterations, ridge, tol) / variance)


def _fit_core(layer: TreeFFN, dense: DenseFFN, x_ND: Tensor) -> Tensor:
    """Take the dense layer's best neurons into the core where it can express them; return what they answer."""
    assert layer.core_in is not None
    assert layer.core_out is not None
    width = layer.core_in.shape[0]
    fits = dense.gate is None and dense.activation == layer.activation and width <= dense.hidden
    if not fits or (layer.core_in_bias is None and bool(dense.up.bias.any())):
        layer.core_out.zero_()  # nothing to start from: the tree answers alone at first
        return torch.zeros(x_ND.shape[0], layer.d_out, dtype=x_ND.dtype)
    small = DenseConfig(hidden=width).build(layer.d_model, layer.d_out, activation=layer.activation)
    small.to(x_ND.dtype).fit_activations(dense, x_ND)
    layer.core_in.copy_(small.up.weight)
    if layer.core_in_bias is not None:
        layer.core_in_bias.copy_(small.up.bias)
    layer.core_out.copy_(small.down.weight.T)
    return small.hidden_activations(x_ND) @ layer.core_out


def fit_splits(layer: TreeFFN, x_ND: Tensor) -> None:
    """Give every node that enough tokens reach a balanced split of them, in place."""
    generator = torch.Generator().manual_seed(0)
    trees, nodes, _ = layer.weight_in.shape
    for k in range(trees):
        reached = [(0, torch.arange(x_ND.shape[0], device=x_ND.device))]
        while reached:
            node, members = reached.pop()
            if len(members) >= _FEWEST:
                _split(layer, k, node, x_ND[members], generator)
            if 2 * node + 2 < nodes:
                z_N = x_ND[members] @ layer.weight_in[k, node]
                bar = -_number(layer.bias_in, k, node) + _number(layer.threshold, k, node)
                right = z_N > bar
                reached += [(2 * node + 1, members[~right]), (2 * node + 2, members[right])]


def _split(layer: TreeFFN, k: int, node: int, x_ND: Tensor, generator: torch.Generator) -> None:
    shifted = layer.bias_in is not None or layer.threshold is not None
    centred = x_ND - x_ND.mean(0) if shifted else x_ND
    direction_D = torch.randn(x_ND.shape[1], generator=generator).to(x_ND)
    for _ in range(2):  # towards large variance, but not all the way: trees shall differ
        direction_D = torch.nn.functional.normalize(centred.T @ (centred @ direction_D), dim=0)
    z_N = x_ND @ direction_D
    scale = 1.0 / z_N.std().clamp_min(1e-6)
    if not bool(torch.isfinite(scale)):
        return
    layer.weight_in[k, node] = direction_D * scale
    ordered = z_N.sort().values * scale
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    if layer.bias_in is not None:
        layer.bias_in[k, node] = -middle
    elif layer.threshold is not None:
        layer.threshold[k, node] = middle


def _number(values_KM: Tensor | None, k: int, node: int) -> float:
    return 0.0 if values_KM is None else float(values_KM[k, node])


def _fit_rows(layer: TreeFFN, x_ND: Tensor, y_ND: Tensor, iterations: int, ridge: float, tol: float) -> Tensor:
    """Solve for out-rows and bias; return the squared residual."""
    z_NKL, nodes_NKL = layer.paths(x_ND)
    fire_NP, index_NP = ACTIVATIONS[layer.activation](z_NKL).flatten(1), nodes_NKL.flatten(1)
    centred = layer.bias is not None
    rows = torch.zeros_like(layer.weight_out)

    def answer(rows: Tensor) -> Tensor:
        out_ND = neuron_sum(fire_NP, index_NP, rows)
        return out_ND - out_ND.mean(0) if centred else out_ND

    def gradient(residual_ND: Tensor) -> Tensor:
        return row_gradient(fire_NP, index_NP, residual_ND, rows, False)

    one = torch.ones(x_ND.shape[0], 1, dtype=x_ND.dtype)
    mass = row_gradient(fire_NP.square(), index_NP, one, rows[..., :1], False)
    penalty = ridge * mass.sum() / (mass > 0).sum().clamp_min(1)
    residual_ND = y_ND - y_ND.mean(0) if centred else y_ND.clone()
    slope = gradient(residual_ND)
    step = slope / (mass + penalty)
    direction, energy_D = step.clone(), (slope * step).sum((0, 1))
    goal = tol**2 * energy_D.sum()
    for _ in range(iterations):
        moved_ND = answer(direction)
        curvature_D = moved_ND.square().sum(0) + penalty * direction.square().sum((0, 1))
        length_D = energy_D / curvature_D.clamp_min(1e-30)
        rows += length_D * direction
        residual_ND = residual_ND - length_D * moved_ND
        slope = gradient(residual_ND) - penalty * rows
        step = slope / (mass + penalty)
        energy_new_D = (slope * step).sum((0, 1))
        direction = step + (energy_new_D / energy_D.clamp_min(1e-30)) * direction
        if energy_new_D.sum() <= goal:
            break
        energy_D = energy_new_D
    layer.weight_out.copy_(rows)
    if layer.bias is not None:
        layer.bias.copy_(y_ND.mean(0) - neuron_sum(fire_NP, index_NP, rows).mean(0))
    return residual_ND.square().sum()
