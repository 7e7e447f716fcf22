"""Start a HireFFN from a dense layer: its weights, and what activations say about sketch, static units and bias.

Legend: N tokens, D width, F neurons, G groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.hire.sketch import low_rank_basis
from nogemm.ops.sketch_and_select import selection_keys, top_indices

if TYPE_CHECKING:
    from nogemm.layers.hire.layer import HireFFN

_TOKENS = 4096  # of the activations, over which the bias is fitted


@torch.no_grad()
def copy_dense(layer: HireFFN, dense: DenseFFN) -> bool:
    """Copy the weights; return whether the shapes allow it."""
    if dense.hidden != layer.hidden or (dense.gate is not None) != layer.gated:
        return False
    layer.up.copy_(dense.up.weight)
    layer.up_bias.copy_(dense.up.bias)
    if layer.gate is not None and layer.gate_bias is not None and dense.gate is not None:
        layer.gate.copy_(dense.gate.weight)
        layer.gate_bias.copy_(dense.gate.bias)
    layer.down.copy_(dense.down.weight.T)
    layer.bias.copy_(dense.down.bias)
    return True


@torch.no_grad()
def fit_data(layer: HireFFN, dense: DenseFFN, x_ND: Tensor) -> None:
    """Fit what the weights alone do not tell, after `copy_dense`.

    A low-rank sketch is whitened by the activations, the static units are those kept most often, and where neurons are
    left out, the mean of what they would have said goes into the bias.
    """
    fit_low_rank(layer, x_ND)
    if layer.always.numel():
        keys_NG = selection_keys(F.linear(x_ND, *layer.selector).float(), layer.key, layer.config.group)
        fired_G = torch.bincount(top_indices(keys_NG, layer.kept).long().flatten(), minlength=keys_NG.shape[1])
        layer.always.copy_(fired_G.topk(layer.always.numel()).indices.sort().values)
    if layer.fitted != "exact":
        sample_ND = x_ND[:: max(1, len(x_ND) // _TOKENS)]
        layer.bias.add_((dense.tokens(sample_ND) - layer.tokens(sample_ND)).mean(0))


def fit_low_rank(layer: HireFFN, x_ND: Tensor | None) -> None:
    """Set a low-rank sketch's two matrices; layers with another sketch have none."""
    reduce, lift = layer.get_buffer_or_none("sketch_reduce"), layer.get_buffer_or_none("sketch_lift")
    if reduce is None or lift is None:
        return
    moment_DD = None if x_ND is None else x_ND.double().T @ x_ND.double() / max(1, len(x_ND))
    basis = low_rank_basis(layer.selector[0], len(reduce), moment_DD)
    for buffer, value in zip((reduce, lift), basis, strict=True):
        buffer.copy_(value)
