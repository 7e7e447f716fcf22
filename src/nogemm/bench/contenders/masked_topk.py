"""The dense-masked training form of top-k: compute all neurons, rank them exactly, multiply the others by zero.

What HireFFN's training step is timed beside; plain torch, as one would write it first.

Legend: N tokens, D width, F neurons.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.errors import ConfigError
from nogemm.layers import ACTIVATIONS, HireFFN


class MaskedTopK(nn.Module):
    """A HireFFN's function and weights in two dense matrices and a mask.

    Raises:
        ConfigError: the layer is gated, or selects by groups, static units or a cutoff.
    """

    def __init__(self, layer: HireFFN) -> None:
        super().__init__()
        config = layer.config
        if layer.gated or config.group > 1 or config.static or config.select != "topk":
            raise ConfigError(f"MaskedTopK: only a plain layer with top-k has this form, got {config}")
        self.kept = layer.kept
        self.act = ACTIVATIONS[layer.activation]
        self.up = nn.Parameter(layer.up.detach().clone())
        self.up_bias = nn.Parameter(layer.up_bias.detach().clone())
        self.down = nn.Parameter(layer.down.detach().T.contiguous())
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x_ND: Tensor) -> Tensor:
        h_NF = self.act(F.linear(x_ND, self.up, self.up_bias))
        with torch.no_grad():
            best_NK = h_NF.abs().topk(self.kept, dim=1, sorted=False).indices
            mask_NF = torch.zeros_like(h_NF).scatter_(1, best_NK, 1.0)
        return F.linear(h_NF * mask_NF, self.down, self.bias)
