"""YOSO packed for evaluation: the tables built once, then hash and gather in one native call.

Legend: N tokens, D width, T hashes, R rows per table.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.layers._base import PackedFFN, Route, packed_of
from nogemm.layers.lookup.layer import rows_of
from nogemm.layers.lookup.packed import kernel_mix, kernel_weight
from nogemm.layers.yoso.layer import YosoFFN, hash_vectors
from nogemm.ops import bucket_sum, gather_accumulate, native_available
from nogemm.ops._packing import quantise_rows
from nogemm.ops.packed_lookup import LookupWeights, pack_lookup, packed_lookup, packed_lookup_rows


@packed_of(YosoFFN)
class PackedYoso(PackedFFN):
    """The evaluation twin of a YosoFFN: T R d_out numbers of tables in place of keys and values.

    dtype "fp32": everything float32; "bf16": rows bfloat16, hashing in 16 bits; "int8": rows int8 with a scale per row,
    hashing in 16 bits. A `faithful` layer keeps the signs of its buffer, so that a packed model answers the same every
    time.

    With the native extension it is LookupFFN's kernel with a score of 1 / T for every code. Without it, or for a
    projection that the kernel does not know, the same runs op by op, hashing in float32. Length one and the gain are
    applied to what the kernel gives.
    """

    gain: Tensor | None

    def __init__(self, layer: YosoFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.unit, self.hashes, self.bits = layer.unit, layer.config.hashes, layer.config.bits
        gain = None if layer.gain is None else layer.gain.detach().float().clone()
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("bias", layer.bias.detach().float().clone(), persistent=False)
        # Whatever comes between the sum and the bias keeps the bias out of the kernel.
        self.finished = not self.unit and gain is None
        weight = kernel_weight(layer.hash)
        self.native = native_available() and weight is not None
        if self.native and weight is not None:
            bias = self.get_buffer("bias") if self.finished else None
            self.register_buffer("packed", pack_lookup(_weights(layer, weight, bias), dtype), persistent=False)
        else:
            self.portable = _PortableYoso(layer, dtype)

    def routes(self, x_ND: Tensor) -> Route:
        if self.native:
            return Route(packed_lookup_rows(x_ND, self.get_buffer("packed"), self.hashes), None)
        return Route(rows_of(self.portable.codes(x_ND.float())[0].unsqueeze(-1), self.bits), None)

    def tokens(self, x_ND: Tensor) -> Tensor:
        if self.native and self.finished:
            return packed_lookup(x_ND, self.get_buffer("packed"), self.d_out)
        x = x_ND.float()
        y = packed_lookup(x, self.get_buffer("packed"), self.d_out) if self.native else self.portable(x)
        y = F.normalize(y, dim=-1) if self.unit else y
        y = y if self.gain is None else y * self.gain
        return (y + self.get_buffer("bias")).to(x_ND.dtype)


def _tables(layer: YosoFFN) -> Tensor:
    """Add up the values of the neurons in each bucket, [T, R, d_out]."""
    with torch.no_grad():
        codes_FT = layer.codes(layer.keys, layer.hash.weight)[0]
        return bucket_sum(layer.values.float(), codes_FT, 2**layer.config.bits)


def _weights(layer: YosoFFN, weight: Tensor, bias: Tensor | None) -> LookupWeights:
    norm = layer.norm
    return LookupWeights(
        d=layer.d_model,
        bits=layer.config.bits,
        neighbours=1,
        score="constant",
        weight=weight,
        mix=kernel_mix(layer.hash),
        projection_bias=None,
        gamma=None if norm is None else norm.weight,
        beta=None if norm is None else norm.bias,
        eps=0.0 if norm is None else norm.eps,
        rows=_tables(layer),
        row_scale=None,
        bias=bias,
        columns=layer.groups * layer.config.bits,
    )


class _PortableYoso(nn.Module):
    """The sum op by op: float32 hashing, rounded rows."""

    row_scale: Tensor | None

    def __init__(self, layer: YosoFFN, dtype: str) -> None:
        super().__init__()
        self.hashes, self.bits, self.groups = layer.config.hashes, layer.config.bits, layer.groups
        self.norm = None if layer.norm is None else copy.deepcopy(layer.norm).float()
        self.hash = copy.deepcopy(layer.hash).float()
        rows, scale = _tables(layer), None
        if dtype != "fp32":
            rows, scale = quantise_rows(rows, dtype)
            # The native gather widens rows as it reads them; the reference would do so with all of them in every call.
            rows = rows if dtype == "int8" or native_available() else rows.float()
        self.register_buffer("tables", rows, persistent=False)
        self.register_buffer("row_scale", scale, persistent=False)
        self.requires_grad_(False)

    def codes(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the code of each token under each hash, [N, T], and which tokens are finite, [N, 1]."""
        q_ND = x_ND if self.norm is None else self.norm(x_ND)
        return hash_vectors(self.hash, q_ND, self.hash.weight, self.groups, self.hashes, self.bits)

    def forward(self, x_ND: Tensor) -> Tensor:
        codes_NT, finite_N1 = self.codes(x_ND)
        scores = torch.where(finite_N1, 1.0 / self.hashes, float("nan")).expand(codes_NT.shape).unsqueeze(-1)
        return gather_accumulate(codes_NT.unsqueeze(-1), scores.contiguous(), self.get_buffer("tables"), self.row_scale)
