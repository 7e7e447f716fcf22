"""Starts of a Switch layer from dense weights: copies of the layer, or parts of it that suit clusters of tokens.

Legend: N tokens, D width, E experts, F hidden width of an expert.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nogemm.layers.dense.layer import DenseFFN
from nogemm.projections import BHProjection, DiagonalChain, Projection

if TYPE_CHECKING:
    from nogemm.layers.switch.layer import SwitchFFN

ROUNDS = 10  # of k-means
MARGIN = 4.0  # mean distance between the logits of the best and the second best expert
RIDGE = 1e-2  # pull of the dense weights on the refitted ones, as a share of the mean squared activation


def upcycle(layer: SwitchFFN, dense: DenseFFN) -> bool:
    """Copy the dense layer into every expert; return whether shapes and activation allow it.

    A nearly constant router gives each expert probability 1/E, which the copies' outputs are multiplied to undo.
    """
    experts = _experts(layer)
    if not _alike(experts[0], dense) or layer.hidden != dense.hidden or layer.norm is not None:
        return False
    if isinstance(layer.router, BHProjection) and layer.router.residual is not None:
        return False  # such a router cannot be made nearly constant
    with torch.no_grad():
        for expert in experts:
            expert.fit_dense(dense)
            expert.down.weight.mul_(len(experts))
            expert.down.bias.mul_(len(experts))
        _quieten(layer.router)
    return True


def _quieten(router: nn.Linear | Projection) -> None:
    """Make a fresh router's logits a hundred times smaller by its last factor."""
    weight = router.weight
    if isinstance(router, DiagonalChain):
        weight = weight.view(router.repeats, router.diagonals, router.width)[:, -1]
    elif isinstance(router, BHProjection):
        weight = weight[:, -1]
    weight.mul_(1e-2)
    if router.bias is not None:
        router.bias.zero_()


def carve(layer: SwitchFFN, dense: DenseFFN, x_ND: Tensor) -> bool:
    """Cluster the tokens, and give each cluster's expert the neurons that carry most of its output.

    The router separates the clusters, logits proportional to v.c_e - |c_e|^2 / 2; the experts' second matrices are
    refitted on their own tokens by ridge regression towards the dense weights. A router that is a projection stays as
    it was drawn, and experts are fitted to the tokens that it sends. Wider experts than the dense layer keep
    their surplus neurons, silenced.
    """
    experts = _experts(layer)
    if not _alike(experts[0], dense):
        return False
    with torch.no_grad():
        v_ND = x_ND if layer.norm is None else layer.norm(x_ND)
        if isinstance(layer.router, nn.Linear):
            _separate(layer.router, v_ND)
        routing = layer.routing(v_ND)
        for index, expert in enumerate(experts):
            mine = routing.expert_N == index
            gate = routing.gate_N[mine].mean() if bool(mine.any()) else torch.ones(())
            _fit_expert(expert, dense, x_ND[mine], v_ND[mine])
            expert.down.weight.div_(gate)
            expert.down.bias.div_(gate)
    return True


def _separate(router: nn.Linear, v_ND: Tensor) -> None:
    """Let the router tell clusters of the tokens apart."""
    centre_ED = cluster(v_ND, router.out_features)
    logits_NE = v_ND @ centre_ED.T - 0.5 * centre_ED.square().sum(1)
    best = logits_NE.topk(min(2, router.out_features), dim=1).values
    sharpness = MARGIN / (best[:, 0] - best[:, -1]).mean().clamp_min(1e-6)
    router.weight.copy_(sharpness * centre_ED)
    router.bias.copy_(-0.5 * sharpness * centre_ED.square().sum(1))


def cluster(v_ND: Tensor, count: int) -> Tensor:
    """Return `count` centres by k-means, started from tokens far from one another; a lone centre keeps its place."""
    distance_N = (v_ND - v_ND.mean(0)).square().sum(1)
    centres = []
    for _ in range(count):  # the farthest point from all centres so far
        centres.append(v_ND[distance_N.argmax()])
        distance_N = torch.minimum(distance_N, (v_ND - centres[-1]).square().sum(1))
    centre_ED = torch.stack(centres)
    for _ in range(ROUNDS):
        nearest_N = (v_ND @ centre_ED.T - 0.5 * centre_ED.square().sum(1)).argmax(1)
        total_ED = torch.zeros_like(centre_ED).index_add_(0, nearest_N, v_ND)
        size_E1 = torch.bincount(nearest_N, minlength=count).unsqueeze(1)
        centre_ED = torch.where(size_E1 > 0, total_ED / size_E1.clamp_min(1), centre_ED)
    return centre_ED


def _fit_expert(expert: DenseFFN, dense: DenseFFN, x_ND: Tensor, v_ND: Tensor) -> None:
    """Choose neurons by the energy they add on these tokens, then refit the second matrix on what the expert sees."""
    size_F = dense.down.weight.square().sum(0)
    energy_F = size_F if not x_ND.shape[0] else dense.hidden_activations(x_ND).square().mean(0) * size_F
    chosen = energy_F.topk(min(expert.hidden, dense.hidden)).indices.sort().values
    kept = len(chosen)
    for mine, theirs in ((expert.up, dense.up), (expert.gate, dense.gate)):
        if mine is not None and theirs is not None:
            mine.weight[:kept].copy_(theirs.weight[chosen])
            mine.bias[:kept].copy_(theirs.bias[chosen])
    expert.down.weight.zero_()
    expert.down.weight[:, :kept].copy_(dense.down.weight[:, chosen])
    expert.down.bias.copy_(dense.down.bias)
    if not x_ND.shape[0]:
        return
    hidden_NF = expert.hidden_activations(v_ND).double()[:, :kept]
    left_ND = (dense.tokens(x_ND) - expert.tokens(v_ND)).double()
    hidden_mean, left_mean = hidden_NF.mean(0), left_ND.mean(0)
    centred = hidden_NF - hidden_mean
    gram_FF = centred.T @ centred
    gram_FF.diagonal().add_(RIDGE * gram_FF.diagonal().mean() + 1e-12)
    change_FD = torch.linalg.solve(gram_FF, centred.T @ (left_ND - left_mean))
    expert.down.weight[:, :kept].add_(change_FD.T)
    expert.down.bias.add_(left_mean - hidden_mean @ change_FD)


def _experts(layer: SwitchFFN) -> list[DenseFFN]:
    return [expert for expert in layer.experts if isinstance(expert, DenseFFN)]


def _alike(expert: DenseFFN, dense: DenseFFN) -> bool:
    return (expert.gate is None) == (dense.gate is None) and expert.activation == dense.activation
