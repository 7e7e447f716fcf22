"""The reference FFF with leaves (fastfeedforward, version 1).

Legend: I input width, O output width, W neurons per leaf, D depth.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nogemm.activations import ActivationName
from nogemm.convert.importers._state import check_keys, check_shape
from nogemm.errors import CheckpointError
from nogemm.layers import LeafTreeConfig, LeafTreeFFN

_KEYS = ("depth", "node_weights", "node_biases", "w1s", "b1s", "w2s", "b2s")
_OPTIONAL = ("node_usage", "leaf_usage")


def fastfeedforward(
    state_dict: Mapping[str, Tensor], *, activation: ActivationName = "relu", leaf_bias: bool = True
) -> LeafTreeFFN:
    """Import one FFF of the package fastfeedforward.

    Keys and shapes::

        depth                       integer scalar D
        node_weights, node_biases   [2^D - 1, I], [2^D - 1, 1]
        w1s, b1s                    [2^D, I, W], [2^D, W]
        w2s, b2s                    [2^D, W, O], [2^D, O]
        node_usage, leaf_usage      counters, left out

    The reference turns right at z >= 0 in evaluation, ours at z > 0: a token exactly on a boundary differs.

    Args:
        state_dict: the layer's tensors, prefix stripped.
        activation: of the leaves; the checkpoint does not say.
        leaf_bias: False drops b2s, which reproduces the reference's evaluation (its training does use them).
    Raises:
        CheckpointError: a key is missing, unknown or of the wrong shape; the message names it.
    """
    name = "fastfeedforward"
    state = check_keys(name, state_dict, _KEYS, _OPTIONAL)
    if state["depth"].numel() != 1 or state["depth"].is_floating_point() or not 0 <= int(state["depth"]) <= 16:
        raise CheckpointError(f"{name}: depth must be one integer from 0 to 16, got {state['depth'].tolist()}")
    depth = int(state["depth"])
    leaves = 2**depth
    _, d_in, width = check_shape(name, state, "w1s", (leaves, None, None))
    _, _, d_out = check_shape(name, state, "w2s", (leaves, width, None))
    check_shape(name, state, "b1s", (leaves, width))
    check_shape(name, state, "b2s", (leaves, d_out))
    check_shape(name, state, "node_weights", (leaves - 1, d_in))
    check_shape(name, state, "node_biases", (leaves - 1, 1))
    config = LeafTreeConfig(depth=depth, leaf_width=width, activation=activation)
    layer = config.build(d_in, d_out).to(state["w1s"].dtype)
    with torch.no_grad():
        layer.node.copy_(state["node_weights"])
        layer.node_bias.copy_(state["node_biases"].squeeze(1))
        layer.leaf_in.copy_(state["w1s"].mT)
        layer.leaf_in_bias.copy_(state["b1s"])
        layer.leaf_out.copy_(state["w2s"])
        layer.leaf_out_bias.copy_(state["b2s"]) if leaf_bias else layer.leaf_out_bias.zero_()
    layer.fitted = "exact"
    return layer
