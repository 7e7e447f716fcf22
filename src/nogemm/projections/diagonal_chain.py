"""Chains of diagonal matrices and fixed fast transforms: ACDC, its Hadamard variant, and D1 H D2 H D3 H.

Legend: N tokens, D padded width (a power of two), r repeats, k layers, M outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nogemm.config import ProjectionConfig, check_choice, check_int, register
from nogemm.cost import Cost
from nogemm.ops import dct, hadamard
from nogemm.projections._padded import PaddedProjection, power_of_two, random_signs


@register
@dataclass(frozen=True, kw_only=True)
class AcdcConfig(ProjectionConfig):
    """k layers of diagonal, cosine transform, diagonal, inverse cosine transform."""

    kind: ClassVar[str] = "acdc"
    depth: int = 4
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("AcdcConfig", "depth", self.depth, 1)

    def build(self, d_in: int, d_out: int) -> DiagonalChain:
        return DiagonalChain(self, d_in, d_out, diagonals=2 * self.depth, transform="cosine", bias=self.bias)


@register
@dataclass(frozen=True, kw_only=True)
class HadamardChainConfig(ProjectionConfig):
    """k layers of diagonal, Hadamard transform, diagonal, Hadamard transform."""

    kind: ClassVar[str] = "hadamard_chain"
    depth: int = 4
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("HadamardChainConfig", "depth", self.depth, 1)

    def build(self, d_in: int, d_out: int) -> DiagonalChain:
        return DiagonalChain(self, d_in, d_out, diagonals=2 * self.depth, transform="hadamard", bias=self.bias)


@register
@dataclass(frozen=True, kw_only=True)
class RandomHadamardConfig(ProjectionConfig):
    """Random signs and Hadamard transforms, three times: D1 H D2 H D3 H.

    Attributes:
        learnable: train the diagonals; otherwise they stay random signs, kept as a buffer.
    """

    kind: ClassVar[str] = "random_hadamard"
    learnable: bool = False
    bias: bool = True

    def build(self, d_in: int, d_out: int) -> DiagonalChain:
        return DiagonalChain(
            self, d_in, d_out, diagonals=3, transform="hadamard", bias=self.bias, learnable=self.learnable
        )


class DiagonalChain(PaddedProjection):
    """Multiply by diagonals with a fixed orthogonal transform after each.

        cosine:    z = x A_1 C G_1 C' A_2 C G_2 C' ...        C the DCT-II, C' its inverse
        hadamard:  z = x D_1 H D_2 H ...                      H / sqrt(D), its own inverse

    `weight` holds the diagonals, flat, to be read as [r, number of diagonals, D]: flat, because optimisers decay
    matrices and leave vectors alone, and a product of many decayed diagonals dies out.

    "scaled" initialisation: random signs, so that every repeat is another random rotation; the last diagonal makes up
    for the zero padding (also where it is not trained). "reference": N(1, 0.01^2), or plain signs for D1 H D2 H D3 H.

    Source: ACDC (Moczulski et al., 2016) and its Hadamard variant as in LookupFFN (Zeng et al., 2023), equation 10;
    D1 H D2 H D3 H (Andoni et al., 2015), equation 9. No permutations between layers.
    Cost: r k (2 D + 5 D log2 D) FLOP per token for ACDC with a cosine transform counted as 2.5 D log2 D;
    r k (2 D + 2 D log2 D) for the Hadamard chain; r 3 D log2 D for D1 H D2 H D3 H, and 3 r D more if learnable.
    """

    def __init__(
        self,
        config: ProjectionConfig,
        d_in: int,
        d_out: int,
        *,
        diagonals: int,
        transform: str,
        bias: bool,
        learnable: bool = True,
    ) -> None:
        super().__init__(config, d_in, d_out, power_of_two(d_in), bias)
        check_choice("DiagonalChain", "transform", transform, ("cosine", "hadamard"))
        self.diagonals = diagonals
        self.transform = transform
        self.learnable = learnable
        flat = torch.empty(self.repeats * diagonals * self.width)
        if learnable:
            self.weight = nn.Parameter(flat)
        else:
            self.register_buffer("weight", flat)
        self.reset_parameters("scaled")

    def reset_parameters(self, init: str) -> None:
        with torch.no_grad():
            if init == "reference" and self.config.kind != RandomHadamardConfig.kind:
                self.weight.normal_(1.0, 0.01)
            else:
                self.weight.copy_(random_signs(self.weight))
            if init != "reference":
                self.weight.view(self.repeats, self.diagonals, -1)[:, -1] *= math.sqrt(self.width / self.d_in)
            if self.bias is not None:
                self.bias.zero_()

    def repeated(self, v_ND: Tensor) -> Tensor:
        return self.chain(v_ND, self.weight)

    def chain(self, v_ND: Tensor, weight: Tensor) -> Tensor:
        """Map [N, D] to [N, r D] with other diagonals than the stored ones."""
        weight_rkD = weight.to(v_ND.dtype).view(self.repeats, self.diagonals, self.width)
        v_NrD = v_ND.unsqueeze(1)
        for i in range(self.diagonals):
            v_NrD = v_NrD * weight_rkD[:, i]
            v_NrD = hadamard(v_NrD) if self.transform == "hadamard" else dct(v_NrD, inverse=i % 2 == 1)
        return v_NrD.flatten(1)

    def cost(self, itemsize: int) -> Cost:
        logarithm = math.log2(self.width)
        transform = (1.0 if self.transform == "hadamard" else 2.5) * self.width * logarithm
        scaling = self.width if self.learnable else 0  # flipping signs is not arithmetic
        flops = self.repeats * self.diagonals * (scaling + transform)
        bias = 0 if self.bias is None else self.bias.numel()
        stored = bias + (self.weight.numel() if self.learnable else 0)
        return Cost(flops, (self.weight.numel() + bias) * itemsize, stored)
