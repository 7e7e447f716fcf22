"""YOSO packed for evaluation: the tables built once, then hash and gather.

Legend: N tokens, D width, T hashes, R rows per table.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.layers._base import PackedFFN
from nogemm.ops import bucket_sum, gather_accumulate, native_available
from nogemm.ops._packing import quantise_rows

if TYPE_CHECKING:
    from nogemm.layers.yoso import YosoFFN


class PackedYoso(PackedFFN):
    """The evaluation twin of a YosoFFN: T R d_out numbers of tables in place of keys and values.

    dtype "fp32": rows float32; "bf16": rows bfloat16; "int8": rows int8 with a scale per row. Hashing is always in
    float32. A `faithful` layer keeps the signs of its buffer, so that a packed model answers the same every time.
    """

    row_scale: Tensor | None
    gain: Tensor | None

    def __init__(self, layer: YosoFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.hashes, self.bits, self.groups, self.unit = (
            layer.config.hashes,
            layer.config.bits,
            layer.groups,
            layer.unit,
        )
        self.norm = None if layer.norm is None else copy.deepcopy(layer.norm).float().requires_grad_(False)
        self.hash = copy.deepcopy(layer.hash).float()
        rows, scale = self._tables(layer, dtype)
        self.register_buffer("tables", rows, persistent=False)
        self.register_buffer("row_scale", scale, persistent=False)
        gain = None if layer.gain is None else layer.gain.detach().float().clone()
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("bias", layer.bias.detach().float().clone(), persistent=False)

    def _tables(self, layer: YosoFFN, dtype: str) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            codes_FT = layer.codes(layer.keys, layer.hash.weight)[0]
            tables_TRD = bucket_sum(layer.values.float(), codes_FT, 2**self.bits)
        if dtype == "fp32":
            return tables_TRD, None
        rows, scale = quantise_rows(tables_TRD, dtype)
        # The native gather widens rows as it reads them; the reference would do so with all of them in every call.
        return (rows if dtype == "int8" or native_available() else rows.float()), scale

    def tokens(self, x_ND: Tensor) -> Tensor:
        from nogemm.layers.yoso import hash_vectors

        x = x_ND.float()
        q_ND = x if self.norm is None else self.norm(x)
        codes_NT, finite_N1 = hash_vectors(self.hash, q_ND, self.hash.weight, self.groups, self.hashes, self.bits)
        codes_NTF = codes_NT.unsqueeze(-1)
        scores = torch.where(finite_N1, 1.0 / self.hashes, float("nan")).expand(codes_NT.shape).unsqueeze(-1)
        y = gather_accumulate(codes_NTF, scores.contiguous(), self.get_buffer("tables"), self.row_scale)
        y = F.normalize(y, dim=-1) if self.unit else y
        y = y if self.gain is None else y * self.gain
        return (y + self.get_buffer("bias")).to(x_ND.dtype)
