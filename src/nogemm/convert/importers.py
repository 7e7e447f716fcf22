"""Turn layers of published reference code into ours, with equal outputs.

Legend: D padded width, B block, n blocks, r repeats, T tables, K bits; of trees: K trees, M nodes each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nogemm.errors import CheckpointError
from nogemm.layers import LookupConfig, LookupFFN, TreeConfig, TreeFFN
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

    | key | shape |
    |---|---|
    | LayerNorm.weight, LayerNorm.bias | [d] |
    | hash.projection.weight | BH4 [r, 4, n, B, B], blocks [out, in]; or dense [T K, d] |
    | hash.projection.bias | [T K] |
    | tables | [T, 2^K, d_out] |
    | bias | [d_out] |

    The reference's Hadamard transform is not normalised; ours is, so each of the four rounds takes a factor sqrt(D).

    Args:
        state_dict: the layer's tensors, prefix stripped (`roberta.encoder.layer.{i}.FFN.` in a whole model).
        eps: of the LayerNorm.
        mix: share of the product in mix * BH4(x) + (1 - mix) * x; 0.7 in the reference. Unused with a dense projection.
    Raises:
        CheckpointError: a key is missing, unknown or of the wrong shape; the message names it.
    """
    state = _check_keys(state_dict)
    d = _shape(state, "LayerNorm.weight", (None,))[0]
    _shape(state, "LayerNorm.bias", (d,))
    tables, rows, d_out = _shape(state, "tables", (None, None, None))
    bits = rows.bit_length() - 1
    if rows != 2**bits or not 1 <= bits <= 16:
        raise CheckpointError(f"tables: the second dimension must be 2^bits with bits from 1 to 16, got {rows}")
    _shape(state, "bias", (d_out,))
    _shape(state, "hash.projection.bias", (tables * bits,))
    weight = state["hash.projection.weight"]
    if weight.dim() == 2:
        _shape(state, "hash.projection.weight", (tables * bits, d))
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
        _shape(state, "hash.projection.weight", (repeats, ROUNDS, width // block, block, block))
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


_TREE_KEYS = ("linear_in.weight", "linear_in.bias", "linear_out.weight")


def ultrafastbert(state_dict: Mapping[str, Tensor], *, trees: int, activation: str = "gelu") -> TreeFFN:
    """Import one FFF layer of UltraFastBERT: what it computes by masking all neurons, at the cost of those on the way.

    | key | shape |
    |---|---|
    | linear_in.weight, linear_in.bias | [K M, d], [K M], tree after tree, heap order inside, M = 2^(D+1) - 1 |
    | linear_out.weight | [d_out, K M] |

    Args:
        state_dict: the layer's tensors, prefix stripped (`encoder.layers.{i}.ffn.` in a whole model).
        trees: K; the depth follows from the shape.
        activation: "gelu", "relu" or "silu".
    Raises:
        CheckpointError: a key is missing, unknown or of the wrong shape; the message names it.
    """
    state = _check_keys(state_dict, "ultrafastbert", _TREE_KEYS)
    neurons, d = _shape(state, "linear_in.weight", (None, None), "ultrafastbert")
    _shape(state, "linear_in.bias", (neurons,), "ultrafastbert")
    d_out, _ = _shape(state, "linear_out.weight", (None, neurons), "ultrafastbert")
    nodes = neurons // trees if trees > 0 and neurons % trees == 0 else 0
    depth = (nodes + 1).bit_length() - 2
    if nodes < 1 or nodes + 1 != 2 ** (depth + 1):
        raise CheckpointError(
            f"ultrafastbert: linear_in.weight has {neurons} neurons, which are not trees={trees} trees of "
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


def _check_keys(
    state_dict: Mapping[str, Tensor], owner: str = "lookupffn", keys: tuple[str, ...] = _KEYS
) -> dict[str, Tensor]:
    missing = [key for key in keys if key not in state_dict]
    extra = [key for key in state_dict if key not in keys]
    if missing or extra:
        parts = [f"missing: {', '.join(missing)}"] if missing else []
        parts += [f"unknown: {', '.join(extra)}"] if extra else []
        raise CheckpointError(f"{owner}: {'; '.join(parts)}. Expected one layer with the keys {', '.join(keys)}")
    return {key: value.detach() for key, value in state_dict.items()}


def _shape(
    state: Mapping[str, Tensor], key: str, expected: tuple[int | None, ...], owner: str = "lookupffn"
) -> tuple[int, ...]:
    """Return the shape of a tensor, or say which key does not have the expected one (None: any positive size)."""
    shape = tuple(state[key].shape)
    fits = len(shape) == len(expected) and all(
        size > 0 if want is None else size == want for size, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if want is None else str(want) for want in expected)
        raise CheckpointError(f"{owner}: {key} has shape {list(shape)}, expected [{wanted}]")
    return shape
