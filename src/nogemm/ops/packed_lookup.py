"""A whole LookupFFN in one native call: pack its weights once, then run.

The op has no backward and no reference of its own: its twin is the composition of the single ops, which tests compare
it with. It exists only where the extension is loaded.

Legend: N tokens, D width, T tables, K bits, R = 2^K rows per table, M = T K.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from nogemm.errors import ConfigError
from nogemm.ops._library import native
from nogemm.ops._packing import PACK_MODES, Addresses, aligned_buffer, define_packed, define_rows, sourced
from nogemm.ops.hash_codes import NATIVE_NEIGHBOURS

_SCORES = ("gelu", "sigmoid", "constant")
_ROW_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_INT4 = 3  # NOGEMM_LOOKUP_INT4


@dataclass(frozen=True, kw_only=True)
class LookupWeights:
    """Everything that the packed form of one LookupFFN is made of, float32 except the rows.

    Attributes:
        score: "gelu", "sigmoid", or "constant": 1 / T for every code, with one neighbour.
        weight: dense projection [M, D], or BH blocks [r, m, n, B, B], rows are outputs; n B is the padded width.
        mix: share of the BH product in mix * product + (1 - mix) * x; 1 for none.
        columns: how many outputs of each BH repeat become bits; 0 for all D.
        rows: [T, R, d_out] float32, bfloat16, or int8 with `row_scale` [T, R].
        row_bits: of a number in dtype "int8", 8 or 4.
        gamma, beta: of the inner LayerNorm [D]; None for no LayerNorm.
    """

    d: int
    bits: int
    neighbours: int
    score: str
    weight: Tensor
    mix: float
    projection_bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    rows: Tensor
    row_scale: Tensor | None
    bias: Tensor | None
    columns: int = 0
    row_bits: int = 8


class _Spec(ctypes.Structure):
    """Mirrors NogemmLookupSpec in csrc/packed/lookup/pack.h; every field is 8 bytes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("mode", "d", "d_out", "tables", "bits", "neighbours", "score")),
        *((name, ctypes.c_int64) for name in ("projection", "rounds", "block", "repeats", "tables_dtype")),
        ("eps", ctypes.c_double),
        ("mix", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("gamma", "beta", "weight", "proj_bias")),
        *((name, ctypes.c_void_p) for name in ("table_rows", "row_scale", "out_bias")),
        *((name, ctypes.c_int64) for name in ("columns", "width")),
    )


def has_packed_kernel(neighbours: int) -> bool:
    """Say whether the fused kernel serves this number of neighbours."""
    return neighbours in NATIVE_NEIGHBOURS


@sourced
def pack_lookup(weights: LookupWeights, dtype: str) -> Tensor:
    """Lay one layer's weights out for `packed_lookup`.

    Args:
        dtype: "fp32", "bf16" (rows and projection in 16 bits) or "int8" (rows of `row_bits` with a scale, projection in
            16 bits).
    Returns:
        one uint8 buffer with a header; valid for the instruction sets of this build, not a file format.
    Raises:
        NativeError: no extension.
        ConfigError: the kernel refuses the combination; the message says why.
    """
    library = native()
    library.nogemm_lookup_pack_size.restype = ctypes.c_int64
    library.nogemm_lookup_pack.restype = ctypes.c_char_p
    library.nogemm_lookup_pack.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    address = Addresses()
    spec = _spec(weights, dtype, address)
    size = max(int(library.nogemm_lookup_pack_size(ctypes.byref(spec))), 0)
    buffer = aligned_buffer(size)
    error = library.nogemm_lookup_pack(ctypes.byref(spec), buffer.data_ptr(), size)
    if error:
        raise ConfigError(f"pack: {error.decode()}")
    return buffer


def packed_lookup(x: Tensor, packed: Tensor, d_out: int) -> Tensor:
    """Run a packed LookupFFN, or YOSO's tables.

        y = bias + sum_t sum_f score[t, f] * table[t, code[t, f]],   codes and scores from projection(norm(x))

    Args:
        x: [..., D], float32, bfloat16 or float16.
        packed: from `pack_lookup`, in the same process.
        d_out: width of y; must be the packed layer's.
    Returns:
        y [..., d_out] in x's dtype, accumulated in float32.
    Raises:
        ValueError: a buffer that `pack_lookup` did not make, or a width that is not the layer's.
    Cost: hash 2 r m D B + r m D log2 D FLOP for D a power of two, gather 2 T F d_out FLOP per token; see
        `LookupFFN.cost`.
    """
    return torch.ops.nogemm.packed_lookup(x, packed, d_out)


def packed_lookup_rows(x: Tensor, packed: Tensor, count: int) -> Tensor:
    """Say which rows a packed LookupFFN reads, without reading them.

    Args:
        x, packed: as in `packed_lookup`.
        count: T F, neighbours of all tables; must be the packed layer's.
    Returns:
        int32 [tokens, T F]; row `code` of table t has the number t R + code.
    """
    return torch.ops.nogemm.packed_lookup_rows(x, packed, count)


def _spec(weights: LookupWeights, dtype: str, address: Addresses) -> _Spec:
    """Fill the C structure; what it points into lives as long as `address`."""
    weight = weights.weight
    is_bh = weight.dim() == 5
    rows = weights.rows if weights.rows.dtype in _ROW_DTYPES else weights.rows.float()
    return _Spec(
        mode=_INT4 if dtype == "int8" and weights.row_bits == 4 else PACK_MODES[dtype],
        d=weights.d,
        d_out=rows.shape[2],
        tables=rows.shape[0],
        bits=weights.bits,
        neighbours=weights.neighbours,
        score=_SCORES.index(weights.score),
        projection=1 if is_bh else 0,
        rounds=weight.shape[1] if is_bh else 0,
        block=weight.shape[4] if is_bh else 0,
        repeats=weight.shape[0] if is_bh else 0,
        tables_dtype=_ROW_DTYPES[rows.dtype],
        eps=weights.eps,
        mix=weights.mix,
        gamma=address.of(weights.gamma),
        beta=address.of(weights.beta),
        weight=address.of(weight),
        proj_bias=address.of(weights.projection_bias),
        table_rows=address.of(rows, rows.dtype),
        row_scale=address.of(weights.row_scale),
        out_bias=address.of(weights.bias),
        columns=weights.columns,
        width=weight.shape[2] * weight.shape[4] if is_bh else 0,
    )


define_packed("packed_lookup")
define_rows("packed_lookup_rows")
