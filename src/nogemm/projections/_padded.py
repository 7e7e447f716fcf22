"""What projections of a fixed width share: pad, repeat until there are enough outputs, cut.

Legend: N tokens, D padded width, r repeats, M outputs.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import ProjectionConfig
from nogemm.ops.hadamard import ORDERS
from nogemm.projections._base import Projection


class PaddedProjection(Projection):
    """A map of D to D numbers, r of them side by side.

        v = pad(x);   z = (map_1(v), ..., map_r(v))[:M] + bias

    D is d_in padded as the map needs, r = max(1, ceil(M / D)).
    """

    def __init__(self, config: ProjectionConfig, d_in: int, d_out: int, width: int, bias: bool) -> None:
        super().__init__(config, d_in, d_out)
        self.width = width
        self.repeats = max(1, math.ceil(d_out / self.width))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def forward(self, x_ND: Tensor) -> Tensor:
        v_ND = x_ND if self.width == self.d_in else F.pad(x_ND, (0, self.width - self.d_in))
        z_NM = self.repeated(v_ND)[:, : self.d_out]
        return z_NM if self.bias is None else z_NM + self.bias

    @abstractmethod
    def repeated(self, v_ND: Tensor) -> Tensor:
        """Map [N, D] to the outputs of all repeats, [N, r D]."""


def power_of_two(d_in: int) -> int:
    """Return the least power of two that is at least `d_in`."""
    return 1 << max(d_in - 1, 0).bit_length()


def padded_width(d_in: int, block: int, pad: str) -> int:
    """Return the width that a BH projection with blocks of `block` pads `d_in` to; see `BHConfig.pad`.

    With pad="hadamard" the factor of order 12 or 20 acts between whole blocks, which in the packed kernel are at least
    16 wide.
    """
    if pad == "power_of_two":
        return power_of_two(d_in)
    least = max(block, 16)
    return min(power_of_two(d_in), *(m * max(power_of_two(math.ceil(d_in / m)), least) for m in ORDERS))


def random_signs(like: Tensor) -> Tensor:
    """Draw -1 and +1 with equal chances, in `like`'s shape."""
    if like.is_meta:
        return like
    return torch.randint(0, 2, like.shape, device=like.device).to(like.dtype) * 2 - 1
