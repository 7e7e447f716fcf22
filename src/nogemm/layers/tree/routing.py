"""What makes a TreeFFN's directions learn and its halves balance, and what its paths look like.

Legend: N tokens, K trees, L levels, M nodes per tree, S = L - 1 steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def step_weights(margin_NKL: Tensor, temperature: float, hardness: float | None) -> Tensor:
    """Weigh each visited node by the steps that lead to it.

        p_s = sigmoid(|margin_s| / temperature), the probability of the way taken;   weight_t = prod_{s < t} w_s

    `hardness` None (straight-through): w_s has the value 1 and the gradient of p_s. Otherwise w_s = h + (1 - h) p_s.

    Args:
        margin_NKL: z - threshold at the visited nodes.
    Returns:
        weights [N, K, L]; 1 at the root.
    """
    chosen_NKS = torch.sigmoid(margin_NKL[..., :-1].abs() / temperature)
    if hardness is None:
        factor_NKS = 1.0 + (chosen_NKS - chosen_NKS.detach())
    else:
        factor_NKS = hardness + (1.0 - hardness) * chosen_NKS
    root_NK1 = torch.ones_like(margin_NKL[..., :1])
    return torch.cat([root_NK1, factor_NKS.cumprod(-1)], dim=-1)


def balance_loss(margin_NKL: Tensor, index_NKL: Tensor, n_nodes: int, temperature: float) -> Tensor:
    """Return how unevenly the nodes split their tokens: 1 if all are even, up to 2 if all send everything one way.

        loss = mean over steps of 2 (f P + (1 - f) (1 - P))

    f is the share of a node's visitors that go right, P their mean probability of it; gradients flow through P. A node
    counts by its visitors, so rare nodes do not drown the others.
    """
    right_T = torch.sigmoid(margin_NKL[..., :-1] / temperature).flatten()
    index_T = index_NKL[..., :-1].flatten()
    if index_T.numel() == 0:
        return right_T.sum()
    zeros = right_T.new_zeros(n_nodes)
    visits = zeros.index_add(0, index_T, torch.ones_like(right_T)).clamp_min(1.0)
    share = zeros.index_add(0, index_T, (margin_NKL[..., :-1] > 0).flatten().to(right_T.dtype)) / visits
    f_T = share[index_T]
    return (2.0 * (f_T * right_T + (1.0 - f_T) * (1.0 - right_T))).mean()


@dataclass(frozen=True, kw_only=True)
class PathStatistics:
    """What the paths of some tokens look like.

    Attributes:
        tokens: how many.
        visits: int64 [K, M], tokens that passed each node.
        dead_nodes: nodes without a visit; `dead_share`: their share of all nodes.
        left_fraction: share of left turns among all turns, 0.5 without turns.
        balance: mean over trees of the entropy of the leaf counts / its most, ln min(leaves, tokens); 1 is even.
        firing: mean over tokens of visited neurons whose activation exceeds a tenth of the token's largest.
    """

    tokens: int
    visits: Tensor
    dead_nodes: int
    dead_share: float
    left_fraction: float
    balance: float
    firing: float


def path_statistics(nodes_NKL: Tensor, fire_NKL: Tensor, nodes: int) -> PathStatistics:
    """Count along the paths; see `PathStatistics`."""
    tokens, trees, levels = nodes_NKL.shape
    visits_KM = torch.bincount(nodes_NKL.flatten().long(), minlength=trees * nodes).view(trees, nodes)
    first_leaf = 2 ** (levels - 1) - 1
    leaves_KJ = visits_KM[:, first_leaf:].double()
    share_KJ = leaves_KJ / max(tokens, 1)
    entropy_K = -(share_KJ * share_KJ.clamp_min(1e-300).log()).sum(1)
    most = math.log(max(min(leaves_KJ.shape[1], tokens), 1))
    turns = tokens * trees * (levels - 1)
    lefts = int(visits_KM[:, 1::2].sum()) if levels > 1 else 0
    size_NP = fire_NKL.flatten(1).abs().double()
    firing = (size_NP > 0.1 * size_NP.amax(1, keepdim=True)).sum(1).double().mean() if tokens else torch.zeros(())
    dead = int((visits_KM == 0).sum())
    return PathStatistics(
        tokens=tokens,
        visits=visits_KM,
        dead_nodes=dead,
        dead_share=dead / visits_KM.numel(),
        left_fraction=lefts / turns if turns else 0.5,
        balance=float(entropy_K.mean()) / most if most > 0 else 1.0,
        firing=float(firing),
    )
