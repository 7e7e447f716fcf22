"""The published training form of a tree of neurons: compute all of them, keep those on the way by a mask.

What TreeFFN's training step is timed beside; plain torch, as a user of the published code would run it.

Legend: N tokens, D width, K trees, L levels, M nodes per tree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.errors import ConfigError
from nogemm.layers import ACTIVATIONS, TreeFFN


class MaskedTree(nn.Module):
    """A TreeFFN's function and weights in two dense matrices and a mask.

    Raises:
        ConfigError: the layer has a core, thresholds or soft routing, which the published form does not know.
    """

    def __init__(self, layer: TreeFFN) -> None:
        super().__init__()
        if layer.core_in is not None or layer.threshold is not None or layer.config.routing != "hard":
            raise ConfigError(f"MaskedTree: only the published form has dense-masked training, got {layer.config}")
        self.levels, self.trees = layer.levels, layer.config.trees
        self.act = ACTIVATIONS[layer.activation]
        self.up = nn.Parameter(layer.weight_in.detach().flatten(0, 1).clone())
        self.up_bias = None if layer.bias_in is None else nn.Parameter(layer.bias_in.detach().flatten().clone())
        self.down = nn.Parameter(layer.weight_out.detach().flatten(0, 1).T.contiguous())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x_ND: Tensor) -> Tensor:
        z_NR = F.linear(x_ND, self.up, self.up_bias)
        with torch.no_grad():
            mask_NR = self._mask(z_NR)
        return F.linear(self.act(z_NR) * mask_NR, self.down, self.bias)

    def _mask(self, z_NR: Tensor) -> Tensor:
        first_K = torch.arange(self.trees) * (z_NR.shape[1] // self.trees)
        node_NK = torch.zeros(z_NR.shape[0], self.trees, dtype=torch.int64)
        mask_NR = torch.zeros_like(z_NR)
        for _ in range(self.levels):
            column_NK = node_NK + first_K
            mask_NR.scatter_(1, column_NK, 1.0)
            node_NK = 2 * node_NK + 1 + (z_NR.gather(1, column_NK) > 0).long()
        return mask_NR
