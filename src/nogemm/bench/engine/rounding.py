"""What a packed layer may differ by from the unpacked one: its rounded twin, and bounds from the twin's own error.

Legend: N tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.bench.engine.check import DENSE_BOUNDS, Bound, compare, token_errors
from nogemm.layers import FFN, DenseFFN, LeafTreeFFN, ShuffleFFN, SwitchFFN, TreeFFN
from nogemm.layers.hashed.layer import HashedNeurons
from nogemm.ops._packing import quantise_rows

DYNAMIC_INT8 = (DenseFFN, ShuffleFFN)
# One token in a thousand (and one of any number) may go another way, where z is nearly at its threshold.
TREE_BOUND = Bound(rms=0.2, token=1e-3, share=1e-3, outlier=3.0)


def check_packed(
    layer: FFN, twin: FFN, y_ND: Tensor, dtype: str, answer: Callable[[nn.Module, torch.dtype], Tensor]
) -> dict[str, Any]:
    """Compare a packed layer's output with the unpacked layer in float64.

    Args:
        layer: unpacked, in evaluation mode.
        twin: the layer `rounded` to dtype.
        y_ND: what the packed layer gave.
        answer: gives the output of an unpacked layer, computed in a dtype, for the same tokens.
    Returns:
        see `nogemm.bench.engine.check.compare`.
    """
    if dtype == "int8" and isinstance(layer, (HashedNeurons, LeafTreeFFN, SwitchFFN)):
        twin = _round_neurons(copy.deepcopy(layer))
    if isinstance(twin, TreeFFN):
        # Rounding sends some tokens another way altogether, so the rounded layer is what must be met.
        return compare(y_ND, answer(copy.deepcopy(twin).double(), torch.float64), TREE_BOUND)
    reference = answer(copy.deepcopy(layer).double(), torch.float64)
    rounded_errors = token_errors(answer(twin, torch.float32), reference)
    return compare(y_ND, reference, our_bound(dtype, rounded_errors, isinstance(layer, DYNAMIC_INT8)))


@torch.no_grad()
def _round_neurons(layer: FFN) -> FFN:
    """Round in-rows and out-rows, in place, to int8 with a scale per neuron, and a tree's nodes to bf16."""
    for dense in layer.modules():
        if isinstance(dense, DenseFFN):
            for linear in (dense.gate, dense.up):
                if linear is not None:
                    linear.weight.copy_(_to_int8(linear.weight))
            dense.down.weight.copy_(_to_int8(dense.down.weight.T).T)
    if isinstance(layer, LeafTreeFFN):
        layer.node.copy_(layer.node.bfloat16())
        for rows in (layer.leaf_in, layer.leaf_out, layer.master_in, layer.master_out):
            if rows is not None:
                rows.copy_(_to_int8(rows))
    return layer


def _to_int8(rows: Tensor) -> Tensor:
    """Round to the values that int8 rows with a scale each can hold."""
    steps, scale = quantise_rows(rows, "int8")
    assert scale is not None
    return steps * scale.unsqueeze(-1)


def our_bound(dtype: str, rounded_errors: Tensor, dynamic_int8: bool = False) -> Bound:
    """Bound our error: exact arithmetic in fp32, else twice what rounding costs the unpacked layer.

    In fp32 one token in a thousand (and one of any number) may read another row, where a bit's value is nearly zero.
    Layers packed as torch's dynamic int8 round activations too, so they get the bound of a dense int8 engine.
    """
    if dtype == "fp32":
        return Bound(rms=0.1, token=1e-3, share=1e-3, outlier=1.0)
    rms, worst = float(rounded_errors.square().mean().sqrt()), float(rounded_errors.max())
    bound = Bound(rms=min(2 * rms + 5e-3, 0.5), token=min(3 * worst + 2e-2, 1.5))
    if dtype == "int8" and dynamic_int8:
        least = DENSE_BOUNDS["int8"]
        return Bound(rms=max(bound.rms, least.rms), token=max(bound.token, least.token))
    return bound
