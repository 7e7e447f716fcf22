"""Two thin matrices: the cheap control that every structured projection must beat.

Legend: N tokens, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import ProjectionConfig, check_int, register
from nogemm.cost import Cost
from nogemm.projections._base import Projection


@register
@dataclass(frozen=True, kw_only=True)
class LowRankConfig(ProjectionConfig):
    """z = U (V x) + c, with `rank` numbers between."""

    kind: ClassVar[str] = "low_rank"
    rank: int = 64
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("LowRankConfig", "rank", self.rank, 1)

    def build(self, d_in: int, d_out: int) -> LowRankProjection:
        return LowRankProjection(self, d_in, d_out)


class LowRankProjection(Projection):
    """Multiply by a [R, d_in] and a [d_out, R] matrix.

    | parameter | shape | |
    |---|---|---|
    | weight | [R, d_in] | first factor |
    | up | [d_out, R] | second factor |
    | bias | [d_out] | |

    Cost: 2 R (d_in + d_out) FLOP per token.
    """

    def __init__(self, config: LowRankConfig, d_in: int, d_out: int) -> None:
        super().__init__(config, d_in, d_out)
        self.weight = nn.Parameter(torch.empty(config.rank, d_in))
        self.up = nn.Parameter(torch.empty(d_out, config.rank))
        self.bias = nn.Parameter(torch.empty(d_out)) if config.bias else None
        self.reset_parameters("scaled")

    def reset_parameters(self, init: str) -> None:
        nn.init.normal_(self.weight, std=self.d_in**-0.5)
        nn.init.normal_(self.up, std=self.weight.shape[0] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(F.linear(x_ND, self.weight), self.up, self.bias)

    def cost(self, itemsize: int) -> Cost:
        matrices = self.weight.numel() + self.up.numel()
        stored = matrices + (0 if self.bias is None else self.bias.numel())
        return Cost(2.0 * matrices, stored * itemsize, stored)
