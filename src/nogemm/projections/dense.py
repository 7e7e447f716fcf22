"""One dense matrix: the projection that every structured one is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import ProjectionConfig, register
from nogemm.cost import Cost
from nogemm.projections._base import Projection


@register
@dataclass(frozen=True, kw_only=True)
class DenseProjectionConfig(ProjectionConfig):
    """z = x W^T + c."""

    kind: ClassVar[str] = "dense"
    bias: bool = True

    def build(self, d_in: int, d_out: int) -> DenseProjection:
        return DenseProjection(self, d_in, d_out)


class DenseProjection(Projection):
    """Multiply by one [d_out, d_in] matrix.

    Cost: 2 d_in d_out FLOP per token.
    """

    def __init__(self, config: DenseProjectionConfig, d_in: int, d_out: int) -> None:
        super().__init__(config, d_in, d_out)
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if config.bias else None
        self.reset_parameters("scaled")

    def reset_parameters(self, init: str) -> None:
        nn.init.normal_(self.weight, std=0.02 if init == "reference" else self.d_in**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND, self.weight, self.bias)

    def cost(self, itemsize: int) -> Cost:
        stored = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        return Cost(2.0 * self.d_in * self.d_out, stored * itemsize, stored)
