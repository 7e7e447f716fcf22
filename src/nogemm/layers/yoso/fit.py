"""Closed-form starts of a YOSO layer from dense weights: with keys and hashes fixed, the output is linear in values.

Legend: N tokens, D width, F neurons, T hashes, G quadrature points.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nogemm.activations import ACTIVATIONS
from nogemm.layers.dense.layer import DenseFFN

if TYPE_CHECKING:
    from nogemm.layers.yoso.layer import YosoFFN

CHUNK = 1024  # tokens whose collisions are counted at a time: bounds memory, not the result


def fit_neurons(layer: YosoFFN, dense: DenseFFN) -> bool:
    """Fit every neuron on its own, for standard normal inputs; return whether the dense layer allows it.

    Neuron i answers act(z) down_i with z = |w_i| g + b_i, g normal. With c = g / sqrt(D) for its cosine, the multiple m
    and constant k of least expected squared error, hash noise included, are

        m = Cov(act(z), p(c)) / (Var p(c) + E[p (1 - p)] / T),   k = E act(z) - m E p(c)

    Cost: F G activations; no data.
    """
    if dense.gate is not None or dense.hidden != layer.hidden:
        return False
    with torch.no_grad():
        take_keys(layer, dense)
        grid_G = torch.linspace(-6.0, 6.0, 241, dtype=torch.float64)
        weight_G = torch.softmax(-0.5 * grid_G.square(), 0)
        size_F1 = dense.up.weight.double().norm(dim=1, keepdim=True)
        act_FG = ACTIVATIONS[dense.activation](size_F1 * grid_G + dense.up.bias.double().unsqueeze(1))
        p_G = layer.collision_probability((grid_G / math.sqrt(layer.d_model)).clamp(-1.0, 1.0))
        mean_act_F, mean_p = act_FG @ weight_G, (p_G * weight_G).sum()
        covariance_F = ((act_FG - mean_act_F.unsqueeze(1)) * (p_G - mean_p)) @ weight_G
        noise = (p_G * (1.0 - p_G) * weight_G).sum() / layer.config.hashes
        multiple_F = covariance_F / (((p_G - mean_p).square() * weight_G).sum() + noise)
        constant_F = mean_act_F - multiple_F * mean_p
        down_FD = dense.down.weight.double().T
        layer.values.copy_(multiple_F.unsqueeze(1) * down_FD)
        layer.bias.copy_(dense.down.bias + constant_F @ down_FD)
    return True


def fit_values(layer: YosoFFN, dense: DenseFFN, x_ND: Tensor, ridge: float = 1e-3) -> None:
    """Solve for values and bias by least squares on the layer's own collision frequencies over x.

        min over V, b of  sum_n |y_n - b - sum_i s_ni V_i|^2 + ridge * mean diagonal * |V|^2

    s_ni is the share of the frozen hashes under which token n and neuron i collide, so this fits what evaluation
    computes, not its expectation.

    Cost: N F T comparisons and O(N F^2 + F^3) FLOP.
    """
    with torch.no_grad():
        take_keys(layer, dense)
        q_ND = x_ND.to(layer.compute_dtype())
        q_ND = q_ND if layer.norm is None else layer.norm(q_ND)
        share_NF = torch.cat([collision_shares(layer, part) for part in q_ND.split(CHUNK)]).double()
        target_ND = dense.tokens(x_ND).double()
        mean_F, mean_D = share_NF.mean(0), target_ND.mean(0)
        centred_NF = share_NF - mean_F
        gram_FF = centred_NF.T @ centred_NF
        gram_FF.diagonal().add_(ridge * gram_FF.diagonal().mean() + 1e-12)
        values_FD = torch.linalg.solve(gram_FF, centred_NF.T @ (target_ND - mean_D))
        layer.values.copy_(values_FD)
        layer.bias.copy_(mean_D - mean_F @ values_FD)


def take_keys(layer: YosoFFN, dense: DenseFFN) -> None:
    """Let keys point where the dense neurons (or their gates) do; the longest first if there are too many."""
    source = dense.up if dense.gate is None else dense.gate
    keys_FD = source.weight
    if layer.norm is not None:  # queries have mean zero: what a key has along (1, ..., 1) only blurs its hash
        keys_FD = keys_FD - keys_FD.mean(1, keepdim=True)
    order = keys_FD.norm(dim=1).argsort(descending=True, stable=True)[: layer.hidden].sort().values
    layer.keys[: len(order)].copy_(keys_FD[order])


def collision_shares(layer: YosoFFN, q_ND: Tensor) -> Tensor:
    """Return the share of the layer's hashes under which token and neuron collide, [N, F]."""
    codes_NT = layer.codes(q_ND, layer.hash.weight)[0]
    codes_FT = layer.codes(layer.keys, layer.hash.weight)[0]
    count_NF = torch.zeros(q_ND.shape[0], layer.hidden, dtype=torch.int32)
    for mine_N, theirs_F in zip(codes_NT.T, codes_FT.T, strict=True):
        count_NF += mine_N.unsqueeze(1) == theirs_F
    return count_NF.to(q_ND.dtype) / layer.config.hashes
