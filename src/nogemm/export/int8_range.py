"""Ranges of int8 weights under which no processor's 8-bit products overflow.

Without dot-product instructions (VNNI) a processor multiplies unsigned 8-bit activations by signed 8-bit weights in
pairs of neighbours and adds each pair in 16 bits, where the sum saturates. The activation is at most 255, so with

    |w_k + w_k+1| <= 128 for neighbours of one sign, in steps of the weight's scale,

a pair is at most 255 * 128 = 32640 < 2^15 and every processor computes the same. NNCF's own remedy, `overflow_fix`,
halves the range of all weights, which costs every matrix a bit. Few pairs of neighbours are both near the largest
weight, so widening the scale of each row just as far as its pairs need costs a tenth of that.

Legend: a matrix has K inputs; its scale is one number or one per output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of two rounded neighbours' sum, less one for their rounding.
_PAIR = 127.0
# What moves numbers without computing any: a quantiser is looked for beyond it.
_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Concat", "Broadcast", "Tile")


def bound_pairs(graph: Any) -> None:
    """Widen the ranges of a graph's 8-bit quantisers, in place, until no pair of products can overflow 16 bits.

    Weights are constants in front of FakeQuantize, as NNCF leaves them with `compress_weights=False`. Two activations
    that are multiplied (attention's queries and keys) have no pairs known in advance: the second one's range doubles.
    """
    for quantiser, node in _second_factors(graph):
        source = quantiser.input_value(0).get_node()
        if source.get_type_name() == "Constant":
            _widen(quantiser, _factor(quantiser, source, node))
        elif node.get_type_name() != "Convolution":
            _widen(quantiser, 2.0)


def _second_factors(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (quantiser, product) for each quantised second factor, a quantiser once."""
    seen: set[str] = set()
    for node in graph.get_ordered_ops():
        if node.get_type_name() not in ("MatMul", "ScaledDotProductAttention", "Convolution", "GroupConvolution"):
            continue
        found = node.input_value(1).get_node()
        while found.get_type_name() in _MOVES:
            found = found.input_value(0).get_node()
        if found.get_type_name() == "FakeQuantize" and found.get_friendly_name() not in seen:
            seen.add(found.get_friendly_name())
            yield found, node


def _factor(quantiser: Any, source: Any, node: Any) -> NDArray[np.float32] | float:
    """Return by how much a weight's scale has to grow, in the shape of the scale."""
    low, high = (quantiser.input_value(i).get_node().get_data() for i in (1, 2))
    weight = source.get_data().astype(np.float32)
    if node.get_type_name() != "MatMul" or weight.ndim != 2 or quantiser.output(0) != node.input_value(1):
        return 2.0  # pairs lie elsewhere: both of them at most 64
    steps = weight / ((high - low) / (quantiser.get_attributes()["levels"] - 1))
    axis = 1 if node.get_attributes()["transpose_b"] else 0
    first, second = np.split(steps, [steps.shape[axis] - 1], axis)[0], np.split(steps, [1], axis)[1]
    pairs = np.abs(first + second)
    pairs = pairs.max(axis, keepdims=True, initial=0.0)
    if low.size == 1:
        return max(1.0, float(pairs.max()) / _PAIR)
    return np.maximum(1.0, pairs / _PAIR).reshape(low.shape)


def _widen(quantiser: Any, factor: NDArray[np.float32] | float) -> None:
    from openvino import opset15 as ov

    for i in range(1, 5):
        bound = quantiser.input_value(i).get_node().get_data()
        quantiser.input(i).replace_source_output(ov.constant((bound * factor).astype(np.float32)).output(0))
