"""Who answers a token of a Switch layer: the expert that the router prefers, unless it is full.

Legend: N tokens, D width, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nogemm.layers._base import Route


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where tokens go.

    Attributes:
        expert_N: chosen expert.
        gate_N: its probability.
        kept_N: False for tokens beyond their expert's capacity.
        balance_loss: E sum_e (share of tokens sent to e) (mean probability of e); 1 if even.
        z_loss: mean squared log-sum-exp of the logits.
    """

    expert_N: Tensor
    gate_N: Tensor
    kept_N: Tensor
    balance_loss: Tensor
    z_loss: Tensor

    def route(self) -> Route:
        """Return the experts as rows; a token beyond its expert's capacity has none."""
        expert_N1 = self.expert_N.masked_fill(~self.kept_N, -1).unsqueeze(1)
        return Route(expert_N1, (self.gate_N * self.kept_N).unsqueeze(1))


def choose_experts(logits_NE: Tensor, capacity: float | None) -> Routing:
    """Route by logits: the largest wins, ties go to the lowest expert, NaN anywhere in a token gives it gate NaN."""
    tokens, experts = logits_NE.shape
    wide = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
    p_NE = wide.softmax(-1)
    expert_N = logits_NE.argmax(-1)
    kept_N = torch.ones_like(expert_N, dtype=torch.bool)
    chosen_NE = nn.functional.one_hot(expert_N, experts)
    if capacity is not None:
        place_N = chosen_NE.cumsum(0).gather(1, expert_N.unsqueeze(1)).squeeze(1)
        kept_N = place_N <= math.ceil(capacity * tokens / experts)
    count = max(tokens, 1)  # an empty call has losses of 0, not NaN
    share_E, mean_E = chosen_NE.to(p_NE.dtype).sum(0) / count, p_NE.sum(0) / count
    return Routing(
        expert_N=expert_N,
        gate_N=p_NE.gather(1, expert_N.unsqueeze(1)).squeeze(1).to(logits_NE.dtype),
        kept_N=kept_N,
        balance_loss=experts * (share_E * mean_E).sum(),
        z_loss=wide.logsumexp(-1).square().sum() / count,
    )


def dispatch(experts: Sequence[Callable[[Tensor], Tensor]], routing: Routing, v_ND: Tensor, d_out: int) -> Tensor:
    """Run each expert on its tokens and weigh the answers; overflowing tokens get 0."""
    y_ND = v_ND.new_zeros(v_ND.shape[0], d_out)
    for index, expert in enumerate(experts):
        mine = torch.nonzero((routing.expert_N == index) & routing.kept_N).squeeze(1)
        if mine.numel():
            y_ND = y_ND.index_copy(0, mine, expert(v_ND[mine]))
    return y_ND * routing.gate_N.unsqueeze(1)
