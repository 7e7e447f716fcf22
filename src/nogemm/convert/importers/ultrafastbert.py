"""The reference FFF of UltraFastBERT: trees of neurons.

Legend: K trees, D depth, M nodes per tree.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nogemm.activations import ActivationName
from nogemm.convert.importers._state import check_keys, check_shape
from nogemm.errors import CheckpointError
from nogemm.layers import TreeConfig, TreeFFN

_KEYS = ("linear_in.weight", "linear_in.bias", "linear_out.weight")


def ultrafastbert(state_dict: Mapping[str, Tensor], *, trees: int, activation: ActivationName = "gelu") -> TreeFFN:
    """Import one FFF layer of UltraFastBERT: what it computes by masking all neurons, at the cost of those on the way.

    Keys and shapes::

        linear_in.weight, linear_in.bias   [K M, d], [K M], tree after tree, heap order inside, M = 2^(D+1) - 1
        linear_out.weight                  [d_out, K M]

    Args:
        state_dict: the layer's tensors, prefix stripped (`encoder.layers.{i}.ffn.` in a whole model).
        trees: K; the depth follows from the shape.
        activation: "gelu", "relu" or "silu".
    Raises:
        CheckpointError: a key is missing, unknown or of the wrong shape; the message names it.
    """
    name = "ultrafastbert"
    state = check_keys(name, state_dict, _KEYS)
    neurons, d = check_shape(name, state, "linear_in.weight", (None, None))
    check_shape(name, state, "linear_in.bias", (neurons,))
    d_out, _ = check_shape(name, state, "linear_out.weight", (None, neurons))
    nodes = neurons // trees if trees > 0 and neurons % trees == 0 else 0
    depth = (nodes + 1).bit_length() - 2
    if nodes < 1 or nodes + 1 != 2 ** (depth + 1):
        raise CheckpointError(
            f"{name}: linear_in.weight has {neurons} neurons, which are not trees={trees} trees of "
            "2^(depth + 1) - 1 (1, 3, 7, ...) each"
        )
    config = TreeConfig(trees=trees, depth=depth, activation=activation, out_bias=False)
    layer = config.build(d, d_out).to(state["linear_in.weight"].dtype)
    assert layer.bias_in is not None
    with torch.no_grad():
        layer.weight_in.copy_(state["linear_in.weight"].view(trees, nodes, d))
        layer.bias_in.copy_(state["linear_in.bias"].view(trees, nodes))
        layer.weight_out.copy_(state["linear_out.weight"].T.reshape(trees, nodes, d_out))
    layer.fitted = "exact"
    return layer
