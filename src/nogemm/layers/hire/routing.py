"""Which neurons of a HireFFN a token is answered by: candidates from the sketch, then the strongest of them, exactly.

Legend: N tokens, D width, F neurons, G groups of g, C candidate groups, K neurons per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.activations import cutoff
from nogemm.layers.hire.sketch import lists_of
from nogemm.ops import neuron_dot
from nogemm.ops.neurons_at_indices import finite_tokens
from nogemm.ops.sketch_and_select import selection_keys, sketch_and_select, top_indices

if TYPE_CHECKING:
    from nogemm.layers.hire.layer import HireFFN


# An int8 sketch is so close that little more than what is kept need be looked at: recall above 0.9999.
_TRAINING_OVERSAMPLE = 1.2


@dataclass(frozen=True)
class Choice:
    """Neurons per token: int32, increasing, negative entries are padding.

    Attributes:
        computed_NC: candidates, computed exactly.
        kept_NK: those of them that answer.
        known_NK: exact pre-activations of the kept ones, where choosing has computed them.
    """

    computed_NC: Tensor
    kept_NK: Tensor
    known_NK: Tensor | None = None


def choose(layer: HireFFN, x_ND: Tensor) -> Choice:
    """Name the neurons that are computed exactly and those that answer."""
    with torch.no_grad():
        finite_N1 = finite_tokens(x_ND)
        x_ND = x_ND if finite_N1 is None else torch.where(finite_N1, x_ND, 0.0)
        if layer.config.select != "topk":
            return _choose_by_cutoff(layer, x_ND)
        weight, bias = layer.selector
        group, groups = layer.config.group, -(-layer.hidden // layer.config.group)
        candidates = _candidate_count(layer)
        if candidates >= groups:  # nothing to sketch
            everything_NC = torch.arange(groups, dtype=torch.int32).expand(x_ND.shape[0], -1)
            members_NC = members_of(layer, everything_NC)
            if layer.kept >= groups:
                return Choice(members_NC, members_NC)
            keys = selection_keys(F.linear(x_ND, weight, bias).float(), layer.key, group, layer.always)
            return Choice(members_NC, members_of(layer, top_indices(keys, layer.kept)))
        candidates_NC = _candidates(layer, x_ND, candidates)
        members_NC = members_of(layer, candidates_NC)
        if candidates == layer.kept:
            return Choice(members_NC, members_NC)
        exact_NC = neuron_dot(x_ND, members_NC, weight, bias)
        chosen = top_indices(_candidate_keys(layer, exact_NC, candidates_NC, members_NC), layer.kept).long()
        kept_NK = members_of(layer, candidates_NC.gather(1, chosen))
        return Choice(members_NC, kept_NK, exact_NC.gather(1, chosen) if group == 1 else None)


def _candidate_count(layer: HireFFN) -> int:
    """Count the candidate groups of a token; fewer while training, where the sketch is int8."""
    if not layer.training or layer.config.sketch == "low_rank":
        return layer.candidates
    return min(layer.candidates, math.ceil(_TRAINING_OVERSAMPLE * layer.kept))


def _candidates(layer: HireFFN, x_ND: Tensor, count: int) -> Tensor:
    sketch = layer.sketch()
    return sketch_and_select(
        sketch.reduced(x_ND),
        sketch.codes_FR,
        sketch.scale_F,
        layer.selector[1].detach().float(),
        count=count,
        key=layer.key,
        group=layer.config.group,
        always_A=layer.always,
    )


def members_of(layer: HireFFN, groups_NC: Tensor) -> Tensor:
    """Spell groups out as neurons, [N, C g]; beyond the last neuron -1."""
    group = layer.config.group
    if group == 1:
        return groups_NC.contiguous()
    members = groups_NC.unsqueeze(-1) * group + torch.arange(group, dtype=torch.int32, device=groups_NC.device)
    return members.masked_fill(members >= layer.hidden, -1).flatten(1)


def _candidate_keys(layer: HireFFN, exact_NK: Tensor, candidates_NC: Tensor, members_NK: Tensor) -> Tensor:
    """Rank candidates by their exact pre-activations; static ones are ranked first."""
    padded_NK = exact_NK.float().masked_fill(members_NK < 0, 0.0)
    keys_NC = selection_keys(padded_NK, layer.key, layer.config.group)
    if layer.always.numel():
        keys_NC = keys_NC.masked_fill(torch.isin(candidates_NC, layer.always.to(candidates_NC.dtype)), float("inf"))
    return keys_NC


def _choose_by_cutoff(layer: HireFFN, x_ND: Tensor) -> Choice:
    """Choose by a cutoff on pre-activations, so each token has as many neurons as lie above."""
    weight, bias = layer.selector
    select, statistical = layer.config.select, layer.config.select == "statistical"
    own_N1 = layer.cutoff(x_ND) if select == "gaussian" else None
    wide = min(1.0, layer.config.keep * layer.config.oversample)
    if (wide if statistical else layer.config.keep) >= 1:
        scores_NF = F.linear(x_ND, weight, bias).float()
        loose_NF = scores_NF.new_full((), -float("inf")) < scores_NF
    else:
        sketch = layer.sketch()
        scores_NF = sketch.scores(x_ND, bias)
        loose_NF = (
            scores_NF > cutoff(scores_NF, wide)
            if statistical
            else (scores_NF + sketch.margins(x_ND) > (0 if own_N1 is None else own_N1))
        )
    limit_N1 = cutoff(scores_NF, layer.config.keep) if statistical else scores_NF.new_zeros(len(scores_NF), 1)
    limit_N1 = limit_N1 if own_N1 is None else own_N1
    candidates_NK = lists_of(loose_NF)
    exact_NK = neuron_dot(x_ND, candidates_NK, weight, bias)
    kept_NK = candidates_NK.masked_fill(~(exact_NK.float() > limit_N1), -1)
    return Choice(candidates_NK, kept_NK, exact_NK if own_N1 is None else (exact_NK - own_N1).to(exact_NK.dtype))
