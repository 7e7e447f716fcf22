"""A whole TreeFFN in one native call: pack its weights once, then run.

The op has no backward and no reference of its own: its twin is the composition of the single ops, which tests compare
it with. It exists only where the extension is loaded.

Legend: D width, K trees, L levels, M = 2^L - 1 nodes per tree, W core neurons.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from nogemm.activations import NUMBERS, activation
from nogemm.errors import ConfigError
from nogemm.ops._library import native
from nogemm.ops._packing import PACK_MODES, Addresses, aligned_buffer, define_packed, define_rows, sourced
from nogemm.ops.tree_descend import levels_of


@dataclass(frozen=True, kw_only=True)
class TreeWeights:
    """Everything that the packed form of one TreeFFN is made of, any floating dtype.

    Attributes:
        activation: by any of its names.
        in_rows, out_rows: [K, M, D] and [K, M, d_out].
        bias, threshold: [K, M].
        core_in, core_out: [W, D] and [W, d_out]; core_bias [W].
        out_bias: [d_out].
    """

    activation: str
    in_rows: Tensor
    out_rows: Tensor
    bias: Tensor | None
    threshold: Tensor | None
    core_in: Tensor | None
    core_bias: Tensor | None
    core_out: Tensor | None
    out_bias: Tensor | None


class _Spec(ctypes.Structure):
    """Mirrors NogemmTreeSpec in csrc/packed/tree/pack.h; every field is 8 bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("mode", "activation", "d", "d_out", "trees", "levels", "core")),
        *((name, ctypes.c_void_p) for name in ("in_rows", "bias", "threshold", "out_rows")),
        *((name, ctypes.c_void_p) for name in ("core_in", "core_bias", "core_out", "out_bias")),
    )


@sourced
def pack_tree(weights: TreeWeights, dtype: str) -> Tensor:
    """Lay one layer's weights out for `packed_tree`: a record per node, its in-row and out-row side by side.

    Args:
        dtype: "fp32", "bf16" (both rows) or "int8" (out-rows with a scale each; in-rows, which decide paths, bf16).
    Returns:
        one uint8 buffer with a header; not a file format.
    Raises:
        NativeError: no extension.
        ConfigError: the kernel refuses the combination; the message says why.
    """
    library = native()
    library.nogemm_tree_pack_size.restype = ctypes.c_int64
    library.nogemm_tree_pack.restype = ctypes.c_char_p
    library.nogemm_tree_pack.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    address = Addresses()
    trees, nodes, width = weights.in_rows.shape
    spec = _Spec(
        mode=PACK_MODES[dtype],
        activation=NUMBERS[activation(weights.activation).name],
        d=width,
        d_out=weights.out_rows.shape[2],
        trees=trees,
        levels=levels_of(nodes),
        core=0 if weights.core_in is None else weights.core_in.shape[0],
        in_rows=address.of(weights.in_rows),
        bias=address.of(weights.bias),
        threshold=address.of(weights.threshold),
        out_rows=address.of(weights.out_rows),
        core_in=address.of(weights.core_in),
        core_bias=address.of(weights.core_bias),
        core_out=address.of(weights.core_out),
        out_bias=address.of(weights.out_bias),
    )
    size = max(int(library.nogemm_tree_pack_size(ctypes.byref(spec))), 0)
    buffer = aligned_buffer(size)
    error = library.nogemm_tree_pack(ctypes.byref(spec), buffer.data_ptr(), size)
    if error:
        raise ConfigError(f"pack: {error.decode()}")
    return buffer


def packed_tree(x: Tensor, packed: Tensor, d_out: int) -> Tensor:
    """Run a packed TreeFFN.

        y = out_bias + sum over visited nodes of act(<in_row, x> + bias) * out_row

    Args:
        x: [..., D], float32, bfloat16 or float16.
        packed: from `pack_tree`, in the same process.
        d_out: width of y; must be the packed layer's.
    Returns:
        y [..., d_out] in x's dtype, accumulated in float32.
    Raises:
        ValueError: a buffer that `pack_tree` did not make, or a width that is not the layer's.
    Cost: 2 (K L + W) (D + d_out) FLOP per token; see `TreeFFN.cost`.
    """
    return torch.ops.nogemm.packed_tree(x, packed, d_out)


def packed_tree_rows(x: Tensor, packed: Tensor, count: int) -> Tensor:
    """Say which nodes a packed TreeFFN visits.

    Args:
        x, packed: as in `packed_tree`.
        count: K L, nodes of all paths; must be the packed layer's.
    Returns:
        int32 [tokens, K L]; node i of tree k has the number k M + i.
    """
    return torch.ops.nogemm.packed_tree_rows(x, packed, count)


define_packed("packed_tree")
define_rows("packed_tree_rows")
