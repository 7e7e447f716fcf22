"""Channel shuffle packed for evaluation: a product per group, and no shuffle of its own.

Legend: N tokens, D width, n groups, F hidden width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.layers._base import PackedFFN, packed_of
from nogemm.layers._tokens import each_alone
from nogemm.layers.shuffle.layer import ShuffleFFN


@packed_of(ShuffleFFN)
class PackedShuffle(PackedFFN):
    """The same in another precision: a product per group, and no shuffle of its own.

    Place j of group g of the first product goes to place j n + g, so what group G of the second one takes is a run of
    neighbours out of every first group: joining those runs is all that is left of shuffling, once the second
    matrices' columns are in that order. (The block_product kernel repacks its weights in every call, which is right for
    training and for the many small blocks of a projection; with these few large blocks it would cost 20 times the
    product at one token.)
    """

    def __init__(self, layer: ShuffleFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.activation = layer.activation
        self.block = layer.config.block
        self.norm = None
        if layer.norm is not None:
            self.norm = nn.LayerNorm(layer.d_model, eps=layer.norm.eps)
            self.norm.load_state_dict(layer.norm.state_dict())
            self.norm.requires_grad_(False)
        groups, width, out = layer.groups, layer.up.shape[1], layer.down.shape[1]
        self.runs = [
            [range(-((g - width * G) // groups), -((g - width * (G + 1)) // groups)) for g in range(groups)]
            for G in range(groups)
        ]
        order = [
            torch.cat([torch.arange(run.start, run.stop) * groups + g for g, run in enumerate(runs)]) - width * G
            for G, runs in enumerate(self.runs)
        ]
        down = [weight[:, columns] for weight, columns in zip(layer.down.detach(), order, strict=True)]
        bias = F.pad(layer.bias.detach(), (0, groups * out - layer.d_out)).unflatten(0, (groups, out))
        self.first = _products(layer.up.detach(), layer.up_bias.detach().unflatten(0, (-1, groups)).T, dtype)
        self.second = _products(down, bias, dtype)

    def tokens(self, x_ND: Tensor) -> Tensor:
        return each_alone(self._finite, x_ND)

    def _finite(self, x_ND: Tensor) -> Tensor:
        x = x_ND.float()
        v_ND = x if self.norm is None else self.norm(x)
        v_ND = F.pad(v_ND, (0, len(self.first) * self.block - self.d_model))
        u = [product(part) for product, part in zip(self.first, v_ND.split(self.block, 1), strict=True)]
        y = []
        for product, runs in zip(self.second, self.runs, strict=True):
            mine = torch.cat([part[:, run.start : run.stop] for part, run in zip(u, runs, strict=True)], 1)
            y.append(product(ACTIVATIONS[self.activation](mine)))
        return torch.cat(y, 1)[:, : self.d_out].to(x_ND.dtype)


def _products(weights: Iterable[Tensor], biases: Iterable[Tensor], dtype: str) -> nn.ModuleList:
    """Make a product with bias for each group, float32 out; int8 by torch's dynamic quantisation."""
    pairs = zip(weights, biases, strict=True)
    if dtype != "int8":
        return nn.ModuleList(_Product(weight_OI, bias_O, dtype) for weight_OI, bias_O in pairs)
    found = nn.ModuleList()
    for weight_OI, bias_O in pairs:
        linear = nn.Linear(weight_OI.shape[1], weight_OI.shape[0]).requires_grad_(False)
        linear.load_state_dict({"weight": weight_OI, "bias": bias_O})
        found.append(linear)
    return torch.ao.quantization.quantize_dynamic(found.eval(), {nn.Linear}, dtype=torch.qint8)


class _Product(nn.Module):
    """x W + b, W in the packed precision, b in float32; W lies as [in, out], which is faster for few tokens."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor, dtype: str) -> None:
        super().__init__()
        weight_IO = weight_OI.T.to(torch.bfloat16 if dtype == "bf16" else torch.float32, copy=True)
        self.register_buffer("weight_IO", weight_IO.contiguous(), persistent=False)
        self.register_buffer("bias", bias_O.float().clone(), persistent=False)

    def forward(self, x_NI: Tensor) -> Tensor:
        weight_IO = self.get_buffer("weight_IO")
        return (x_NI.to(weight_IO.dtype) @ weight_IO).float() + self.get_buffer("bias")
