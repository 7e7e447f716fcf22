"""Start a LeafTreeFFN from a dense layer and its activations: balanced splits, then a small dense layer in each leaf.

Legend: N tokens, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nogemm.layers.dense.config import DenseConfig
from nogemm.layers.dense.layer import DenseFFN

if TYPE_CHECKING:
    from nogemm.layers.leaf_tree.layer import LeafTreeFFN


@torch.no_grad()
def fit_leaf_tree(layer: LeafTreeFFN, dense: DenseFFN, x_ND: Tensor) -> None:
    """Split the tokens into halves along the direction in which they vary most, and give each leaf the dense layer's
    best neurons for its own tokens, refitted (see `DenseFFN.fit_activations`).

    Where the dense layer is gated or has another activation, a leaf keeps random neurons and answers its tokens' mean
    output.

    Args:
        x_ND: at least one token, in the layer's dtype.
    """
    parts = [torch.arange(x_ND.shape[0])]
    for i in range(len(layer.node)):
        here = x_ND[parts[i]] if len(parts[i]) > 1 else x_ND
        direction_D = leading_direction(here)
        cut = (here @ direction_D).median()
        layer.node[i] = direction_D
        layer.node_bias[i] = -cut
        right = x_ND[parts[i]] @ direction_D - cut > 0
        parts += [parts[i][~right], parts[i][right]]
    for leaf, part in enumerate(parts[len(layer.node) :]):
        _fit_leaf(layer, leaf, dense, x_ND[part] if len(part) else x_ND)
    if layer.master_out is not None and layer.master_gate is not None:
        layer.master_out.zero_()  # the leaves alone were fitted: let the gate open to the master leaf by training
        layer.leaf_out.div_(torch.sigmoid(layer.master_gate))
        layer.leaf_out_bias.div_(torch.sigmoid(layer.master_gate))


def _fit_leaf(layer: LeafTreeFFN, leaf: int, dense: DenseFFN, x_ND: Tensor) -> None:
    layer.leaf_out[leaf] = 0.0
    if dense.gate is not None or dense.activation != layer.activation:
        layer.leaf_out_bias[leaf] = dense.tokens(x_ND).mean(0)
        return
    width = min(layer.config.leaf_width, dense.hidden)
    small = DenseConfig(hidden=width).build(layer.d_model, layer.d_out, activation=layer.activation).to(x_ND.dtype)
    small.fit_activations(dense, x_ND)
    layer.leaf_in[leaf, :width] = small.up.weight
    layer.leaf_in_bias[leaf, :width] = small.up.bias
    layer.leaf_out[leaf, :width] = small.down.weight.T
    layer.leaf_out_bias[leaf] = small.down.bias


def leading_direction(x_ND: Tensor, steps: int = 20) -> Tensor:
    """Return the unit vector along which x varies most, by power iteration from the widest coordinate."""
    centred = x_ND - x_ND.mean(0)
    direction_D = torch.zeros_like(centred[0])
    direction_D[centred.square().sum(0).argmax()] = 1.0
    for _ in range(steps):
        moved_D = centred.T @ (centred @ direction_D)
        size = moved_D.norm()
        if not size > 0:
            break
        direction_D = moved_D / size
    return direction_D
