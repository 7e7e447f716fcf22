"""The reference LookupFFN (mlpen/LookupFFN).

Legend: D padded width, B block, n blocks, r repeats, T tables, K bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nogemm.convert.importers._state import check_keys, check_shape
from nogemm.errors import CheckpointError
from nogemm.layers import LookupConfig, LookupFFN
from nogemm.projections import BHConfig, DenseProjectionConfig

ROUNDS = 4  # the reference knows BH4 only

_KEYS = (
    "LayerNorm.weight",
    "LayerNorm.bias",
    "hash.projection.weight",
    "hash.projection.bias",
    "tables",
    "bias",
)


def lookupffn(state_dict: Mapping[str, Tensor], *, eps: float = 1e-5, mix: float = 0.7) -> LookupFFN:
    """Import one LookupFFN of the reference code (mlpen/LookupFFN), with the semantics of its GPU kernels.

    Keys and shapes::

        LayerNorm.weight, LayerNorm.bias   [d]
        hash.projection.weight             BH4 [r, 4, n, B, B], blocks [out, in]; or dense [T K, d]
        hash.projection.bias               [T K]
        tables                             [T, 2^K, d_out]
        bias                               [d_out]

    The reference's Hadamard transform is not normalised; ours is, so each of the four rounds takes a factor sqrt(D).

    Args:
        state_dict: the layer's tensors, prefix stripped (`roberta.encoder.layer.{i}.FFN.` in a whole model).
        eps: of the LayerNorm.
        mix: share of the product in mix * BH4(x) + (1 - mix) * x; 0.7 in the reference. Unused with a dense projection.
    Raises:
        CheckpointError: a key is missing, unknown or of the wrong shape; the message names it.
    """
    state = check_keys("lookupffn", state_dict, _KEYS)
    d = check_shape("lookupffn", state, "LayerNorm.weight", (None,))[0]
    check_shape("lookupffn", state, "LayerNorm.bias", (d,))
    tables, rows, d_out = check_shape("lookupffn", state, "tables", (None, None, None))
    bits = rows.bit_length() - 1
    if rows != 2**bits or not 1 <= bits <= 16:
        raise CheckpointError(f"tables: the second dimension must be 2^bits with bits from 1 to 16, got {rows}")
    check_shape("lookupffn", state, "bias", (d_out,))
    check_shape("lookupffn", state, "hash.projection.bias", (tables * bits,))
    weight = state["hash.projection.weight"]
    if weight.dim() == 2:
        check_shape("lookupffn", state, "hash.projection.weight", (tables * bits, d))
        projection: BHConfig | DenseProjectionConfig = DenseProjectionConfig()
    else:
        width = 1 << max(d - 1, 0).bit_length()
        repeats = max(1, math.ceil(tables * bits / width))
        block = weight.shape[-1] if weight.dim() == 5 else 1
        if block < 1 or width % block:
            raise CheckpointError(
                f"lookupffn: hash.projection.weight has blocks of {block}, which do not divide {width} ({d} padded "
                "to a power of two)"
            )
        check_shape("lookupffn", state, "hash.projection.weight", (repeats, ROUNDS, width // block, block, block))
        weight = weight * math.sqrt(width)
        projection = BHConfig(rounds=ROUNDS, block=block, residual=mix)
    config = LookupConfig(tables=tables, bits=bits, projection=projection, norm_eps=eps)
    layer = config.build(d, d_out).to(weight.dtype)
    assert layer.norm is not None
    assert layer.bias is not None
    assert layer.projection.bias is not None
    with torch.no_grad():
        layer.norm.weight.copy_(state["LayerNorm.weight"])
        layer.norm.bias.copy_(state["LayerNorm.bias"])
        layer.projection.weight.copy_(weight)
        layer.projection.bias.copy_(state["hash.projection.bias"])
        layer.tables.copy_(state["tables"])
        layer.bias.copy_(state["bias"])
    layer.fitted = "exact"
    return layer
