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
from nogemm.layers import FFN

# One token in a thousand (and one of any number) may go another way, where z is nearly at its threshold.
TREE_BOUND = Bound(rms=0.2, token=1e-3, share=1e-3, outlier=3.0)


def check_packed(
    layer: FFN, twin: FFN, y_ND: Tensor, dtype: str, answer: Callable[[nn.Module, torch.dtype], Tensor]
) -> dict[str, Any]:
    """Compare a packed layer's output with the unpacked layer in float64.

    Args:
        layer: unpacked, in evaluation mode.
        twin: `layer.rounded(dtype)`.
        y_ND: what the packed layer gave.
        answer: gives the output of an unpacked layer, computed in a dtype, for the same tokens.
    Returns:
        see `nogemm.bench.engine.check.compare`.
    """
    if layer.in_turn:
        # Rounding sends some tokens another way altogether, so the rounded layer is what must be met.
        return compare(y_ND, answer(copy.deepcopy(twin).double(), torch.float64), TREE_BOUND)
    reference = answer(copy.deepcopy(layer).double(), torch.float64)
    rounded_errors = token_errors(answer(twin, torch.float32), reference)
    return compare(y_ND, reference, our_bound(dtype, rounded_errors, layer.dynamic_int8))


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
