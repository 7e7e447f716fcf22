"""One block-diagonal matrix and a fixed shuffle: the projection of ShuffleNet.

Legend: N tokens, D padded width (a multiple of B), B block width, n = D/B blocks, r repeats, M outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nogemm.config import ProjectionConfig, check_int, register
from nogemm.cost import Cost
from nogemm.errors import ConfigError
from nogemm.ops import block_product
from nogemm.projections._padded import PaddedProjection
from nogemm.projections.bh import random_orthogonal


@register
@dataclass(frozen=True, kw_only=True)
class ShuffleProjectionConfig(ProjectionConfig):
    """Blocks of width `block`, then a shuffle; the input is padded to a multiple of `block`."""

    kind: ClassVar[str] = "shuffle"
    block: int = 64
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("ShuffleProjectionConfig", "block", self.block, 1)

    def build(self, d_in: int, d_out: int) -> ShuffleProjection:
        return ShuffleProjection(self, d_in, d_out)


class ShuffleProjection(PaddedProjection):
    """Mix inside blocks, then deal the outputs round: place i of block j goes to place i n + j.

        v = blockdiag(W) pad(x);   z = transpose of v seen as [n, B], flattened

    A fixed order of the outputs, so the shuffle matters only to what comes after: neighbouring outputs depend on
    different inputs. Fitted to a Gaussian matrix its relative squared error is exactly 1 - B/D, as BH1's.

    | parameter | shape | |
    |---|---|---|
    | weight | [r, n, B, B] | blocks, rows are outputs |
    | bias | [M] | |

    Source: ShuffleNet (Zhang et al., 2018), as in LookupFFN (Zeng et al., 2023), figure 5.
    Cost: r 2 D B FLOP per token; r D B weights.
    """

    def __init__(self, config: ShuffleProjectionConfig, d_in: int, d_out: int) -> None:
        if config.block > d_in:
            raise ConfigError(f"ShuffleProjectionConfig: block={config.block} is wider than the input, d_in={d_in}")
        blocks = math.ceil(d_in / config.block)
        super().__init__(config, d_in, d_out, blocks * config.block, config.bias)
        self.weight = nn.Parameter(torch.empty(self.repeats, blocks, config.block, config.block))
        self.reset_parameters("scaled")

    def reset_parameters(self, init: str) -> None:
        if init == "reference":
            nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
        else:
            with torch.no_grad():
                self.weight.copy_(random_orthogonal(self.weight))
                block = self.weight.shape[-1]
                self.weight[:, -1] *= math.sqrt(block / (block - self.width + self.d_in))  # the last is partly padding
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def repeated(self, v_ND: Tensor) -> Tensor:
        repeats, blocks, block, _ = self.weight.shape
        out = block_product(v_ND.repeat(1, repeats), self.weight.flatten(0, 1))
        return out.view(-1, repeats, blocks, block).transpose(2, 3).reshape(-1, repeats * self.width)

    def cost(self, itemsize: int) -> Cost:
        stored = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        return Cost(2.0 * self.weight.numel(), stored * itemsize, stored)
