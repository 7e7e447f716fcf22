"""BH{m}: m rounds of a block-diagonal matrix followed by a Hadamard transform.

Legend: N tokens, D padded width (see `BHConfig.pad`), B block width, n = D/B blocks, r repeats, m rounds, M outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import ProjectionConfig, check_int, register
from nogemm.cost import Cost
from nogemm.errors import ConfigError
from nogemm.ops import block_product, hadamard
from nogemm.ops.hadamard import hadamard_flops
from nogemm.projections._base import Projection
from nogemm.projections._padded import padded_width

Pad = Literal["power_of_two", "hadamard"]


@register
@dataclass(frozen=True, kw_only=True)
class BHConfig(ProjectionConfig):
    """x B_1 H B_2 H ... B_m H, with blocks of width `block`.

    Attributes:
        rounds: m; 4 is the paper's choice.
        block: B, a power of two that divides the padded width.
        residual: None, or the share c of the product in c * product + (1 - c) * x (the reference code uses 0.7).
        bias: add a trainable bias to the output.
        pad: what D is: "power_of_two", the next one, as published; or "hadamard", the least m 2^k with m = 1, 12 or 20,
            and 2^k a multiple of `block` and of 16 where m is not 1: 768 stays 768, and 1280 stays 1280.
    """

    kind: ClassVar[str] = "bh"
    rounds: int = 4
    block: int = 64
    residual: float | None = None
    bias: bool = True
    pad: Pad = "power_of_two"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("BHConfig", "rounds", self.rounds, 1)
        check_int("BHConfig", "block", self.block, 1)
        if self.block & (self.block - 1):
            raise ConfigError(f"BHConfig: block must be a power of two, got block={self.block}")
        if self.residual is not None and not (0.0 < self.residual <= 1.0):
            raise ConfigError(f"BHConfig: residual must be in (0, 1] or None, got residual={self.residual}")

    def build(self, d_in: int, d_out: int) -> BHProjection:
        return BHProjection(self, d_in, d_out)


class BHProjection(Projection):
    """Mix all inputs with little arithmetic: blocks mix inside, the Hadamard transform mixes between.

        v = pad(x) tiled r times;   m times: v <- blockdiag(W_i) v,  v <- v H / sqrt(D);   z = v[:M] + bias

    H is orthonormal here, symmetric, of order D = 2^k or, with `pad="hadamard"`, also 12 2^k or 20 2^k (a choice of
    ours: the published layer pads to a power of two). The reference's unnormalised H is absorbed by the importer. With
    `residual` c, the product is replaced by c * product + (1 - c) * tiled pad(x) before the cut.

    | parameter | shape | |
    |---|---|---|
    | weight | [r, m, n, B, B] | blocks, rows are outputs |
    | bias | [M] | |

    Source: LookupFFN (Zeng et al., 2023), equation 11; padding, repeats and bias as in its code.
    Cost: r m (2 D B + D log2 D) FLOP per token, D a power of two (others: `hadamard_flops`); r m D B weights.
    """

    def __init__(self, config: BHConfig, d_in: int, d_out: int) -> None:
        super().__init__(config, d_in, d_out)
        self.width = padded_width(d_in, config.block, config.pad)
        if config.block > self.width:
            raise ConfigError(
                f"BHConfig: block={config.block} does not divide the padded width {self.width} (d_in={d_in} "
                f"padded with pad={config.pad!r})"
            )
        self.repeats = max(1, math.ceil(d_out / self.width))
        blocks = self.width // config.block
        self.weight = nn.Parameter(torch.empty(self.repeats, config.rounds, blocks, config.block, config.block))
        self.bias = nn.Parameter(torch.empty(d_out)) if config.bias else None
        self.residual = config.residual
        self.reset_parameters("scaled")

    def reset_parameters(self, init: str) -> None:
        block = self.weight.shape[-1]
        if init == "reference":
            nn.init.normal_(self.weight, std=block**-0.5)
        else:
            # Orthogonal blocks keep every round an isometry, so depth does not change the scale; the last round makes
            # up for the zero padding and the residual share c: c^2 s^2 d/D + (1 - c)^2 d/D = 1.
            with torch.no_grad():
                self.weight.copy_(random_orthogonal(self.weight))
            share = 1.0 if self.residual is None else self.residual
            with torch.no_grad():
                self.weight[:, -1] *= math.sqrt(self.width / self.d_in - (1.0 - share) ** 2) / share
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        tokens = x_ND.shape[0]
        start = F.pad(x_ND, (0, self.width - self.d_in)).repeat(1, self.repeats)
        v = start
        for i in range(self.weight.shape[1]):
            v = block_product(v, self.weight[:, i].flatten(0, 1))
            v = hadamard(v.reshape(tokens * self.repeats, self.width)).reshape(tokens, self.repeats * self.width)
        if self.residual is not None:
            v = self.residual * v + (1.0 - self.residual) * start
        z_NM = v[:, : self.d_out]
        return z_NM if self.bias is None else z_NM + self.bias

    def cost(self, itemsize: int) -> Cost:
        rounds, block = self.weight.shape[1], self.weight.shape[-1]
        flops = self.repeats * rounds * (2 * self.width * block + hadamard_flops(self.width))
        stored = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        return Cost(flops, stored * itemsize, stored)


def random_orthogonal(like: Tensor) -> Tensor:
    """Draw orthogonal matrices of `like`'s shape [..., B, B], uniformly: Q of a Gaussian's QR, signs from R.

    All at once: one call per matrix would make converting a model take seconds.
    """
    if like.is_meta:  # shapes only: somebody builds the layer to load weights into it
        return like
    q, r = torch.linalg.qr(torch.randn(like.shape, dtype=torch.float32, device=like.device))
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
