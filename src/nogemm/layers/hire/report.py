"""How well a HireFFN finds its strongest neurons.

Legend: N tokens, D width, F neurons, K neurons per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.activations import cutoff
from nogemm.layers.hire.routing import members_of
from nogemm.layers.hire.sketch import lists_of
from nogemm.ops.sketch_and_select import selection_keys, top_indices

if TYPE_CHECKING:
    from nogemm.layers.hire.layer import HireFFN


@dataclass(frozen=True)
class HireReport:
    """How well a layer finds its strongest neurons on given tokens.

    Attributes:
        recall: mean over tokens of |S n S*| / |S*|; S are the neurons computed exactly, S* those that exact arithmetic
            would keep. 1 for a token that keeps none.
        energy: 1 - |y - y*|^2 / |y*|^2 over all tokens; y* is the same layer with S* (biases of the output left out).
        dense_energy: the same against all neurons.
        computed, kept: mean share of the neurons computed exactly, and kept.
    """

    recall: float
    energy: float
    dense_energy: float
    computed: float
    kept: float


def measure_recall(layer: HireFFN, x_ND: Tensor) -> HireReport:
    """Compare what the sketch finds with what exact arithmetic would keep, on tokens x [N, D]."""
    with torch.no_grad():
        choice = layer.choose(x_ND)
        computed_NK, kept_NK = choice.computed_NC, choice.kept_NK
        scores_NF = F.linear(x_ND, *layer.selector).float()
        if layer.config.select == "topk":
            keys = selection_keys(scores_NF, layer.key, layer.config.group, layer.always)
            best = mask_of(members_of(layer, top_indices(keys, layer.kept)), layer.hidden)
        else:
            statistical = layer.config.select == "statistical"
            limit = layer.cutoff(x_ND) if layer.config.select == "gaussian" else 0.0
            best = scores_NF > (cutoff(scores_NF, layer.config.keep) if statistical else limit)
        found = (mask_of(computed_NK, layer.hidden) & best).sum(-1)
        recall = torch.where(best.any(-1), found / best.sum(-1).clamp_min(1), 1.0).mean()
        y, ideal = (layer.at(x_ND, index) - layer.bias for index in (kept_NK, lists_of(best)))
        everything = layer.at(x_ND, lists_of(torch.ones_like(best))) - layer.bias
    return HireReport(
        recall=float(recall),
        energy=_energy(y, ideal),
        dense_energy=_energy(y, everything),
        computed=float((computed_NK >= 0).sum()) / max(1, best.numel()),
        kept=float((kept_NK >= 0).sum()) / max(1, best.numel()),
    )


def mask_of(index_NK: Tensor, count: int) -> Tensor:
    """Turn padded lists of indices into a mask [N, count]."""
    mask = torch.zeros(index_NK.shape[0], count + 1, dtype=torch.bool, device=index_NK.device)
    return mask.scatter_(1, torch.where(index_NK < 0, count, index_NK).long(), True)[:, :count]


def _energy(y: Tensor, ideal: Tensor) -> float:
    total = ideal.double().square().sum()
    return 1.0 - float((y.double() - ideal.double()).square().sum() / total) if float(total) > 0 else 1.0
