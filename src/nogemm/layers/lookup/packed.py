"""LookupFFN packed for evaluation: one native call per layer, or the same arithmetic in PyTorch without the extension.

Legend: N tokens, D width, T tables, R rows per table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nogemm.layers._base import Kernel, PackedFFN, Route, packed_of
from nogemm.layers.lookup.config import LookupConfig
from nogemm.layers.lookup.layer import LookupFFN, rows_of
from nogemm.ops import gather_accumulate, hash_codes, native_available
from nogemm.ops.packed_lookup import LookupWeights, has_packed_kernel, pack_lookup, packed_lookup, packed_lookup_rows
from nogemm.projections import BHProjection, DenseProjection, DiagonalChain, Projection


@packed_of(LookupFFN)
class PackedLookup(PackedFFN):
    """The evaluation twin of a LookupFFN.

    dtype "fp32": everything float32. "bf16": rows bfloat16, projection in 16 bits. "int8": rows int8, or of
    `config.row_bits`, with a scale per row, projection in 16 bits. Accumulation is float32 always; y has x's dtype.

    With the native extension the weights live in one buffer laid out for the instruction set in force; it is neither a
    parameter nor saved. Without it, or for a projection or a number of neighbours that the kernel does not know, the
    rounded weights run op by op: projection, codes, gather.
    """

    config: LookupConfig

    def __init__(self, layer: LookupFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        known = kernel_weight(layer.projection) is not None and has_packed_kernel(layer.config.neighbours)
        self.native = native_available() and known
        if self.native:
            self.register_buffer("packed", pack_lookup(_weights(layer), dtype), persistent=False)
        else:
            self.portable = _PortableLookup(layer, dtype)

    @property
    def kernel(self) -> Kernel | None:
        return Kernel(number=0, phases=("hash", "gather")) if self.native else None

    def routes(self, x_ND: Tensor) -> Route:
        if self.native:
            count = self.config.tables * self.config.neighbours
            return Route(packed_lookup_rows(x_ND, self.get_buffer("packed"), count), None)
        codes_NTF, scores_NTF = self.portable.codes_and_scores(x_ND)
        return Route(rows_of(codes_NTF, self.config.bits), scores_NTF.flatten(1))

    def tokens(self, x_ND: Tensor) -> Tensor:
        if self.native:
            return packed_lookup(x_ND, self.get_buffer("packed"), self.d_out)
        return self.portable(x_ND)


def kernel_weight(projection: Projection) -> Tensor | None:
    """Return the projection as the kernel takes it, dense [M, D] or BH blocks [r, m, n, B, B]; None if it cannot."""
    if isinstance(projection, DiagonalChain) and projection.transform == "hadamard":
        # A diagonal is a block-diagonal matrix of blocks of one number.
        return projection.weight.view(projection.repeats, projection.diagonals, projection.width, 1, 1)
    return projection.weight if isinstance(projection, (BHProjection, DenseProjection)) else None


def kernel_mix(projection: Projection) -> float:
    """Return the share of the product in z, beside that of x; 1 for none of x."""
    residual = projection.residual if isinstance(projection, BHProjection) else None
    return 1.0 if residual is None else residual


def _weights(layer: LookupFFN) -> LookupWeights:
    """Collect what the kernel packs; compressed rows go in as they are stored."""
    projection, norm = layer.projection, layer.norm
    weight = kernel_weight(projection)
    assert weight is not None
    exact = layer.config.row_bits is not None  # its integers are packed as they were trained
    rows, row_scale = layer.integer_rows() if exact else (layer.tables, layer.row_scale)
    return LookupWeights(
        d=layer.d_model,
        bits=layer.config.bits,
        neighbours=layer.config.neighbours,
        score=layer.config.score,
        weight=weight,
        mix=kernel_mix(projection),
        projection_bias=projection.bias,
        gamma=None if norm is None else norm.weight,
        beta=None if norm is None else norm.bias,
        eps=0.0 if norm is None else norm.eps,
        rows=rows,
        row_scale=row_scale,
        bias=layer.bias,
        row_bits=layer.config.row_bits or 8,
    )


class _PortableLookup(nn.Module):
    """The packed arithmetic op by op: rounded weights, float32 accumulation."""

    row_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: LookupFFN, dtype: str) -> None:
        super().__init__()
        self.config = layer.config
        projection = layer.config.projection.build(layer.d_model, layer.config.tables * layer.config.bits)
        self.norm = None if layer.norm is None else nn.LayerNorm(layer.d_model, eps=layer.norm.eps)
        self.projection = projection
        rows, scale = layer.rows_as(dtype)
        # The native gather widens rows as it reads them; the reference would do so with all of them in every call.
        keep = rows.dtype == torch.int8 or native_available()
        self.register_buffer("tables", rows if keep else rows.float(), persistent=False)
        self.register_buffer("row_scale", None if scale is None else scale.float(), persistent=False)
        bias = None if layer.bias is None else layer.bias.detach().float().clone()
        self.register_buffer("bias", bias, persistent=False)
        with torch.no_grad():
            projection.load_state_dict(layer.projection.state_dict())
            for parameter in projection.weights() if dtype != "fp32" else ():
                parameter.copy_(parameter.bfloat16())
            if self.norm is not None and layer.norm is not None:
                self.norm.load_state_dict(layer.norm.state_dict())
        self.eval().requires_grad_(False)

    def codes_and_scores(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows that each token reads and their weights, both [N, T, F]."""
        x = x_ND.float()
        z_NM = self.projection(x if self.norm is None else self.norm(x))
        return hash_codes(z_NM, self.config.bits, self.config.neighbours, self.config.score == "gelu")

    def forward(self, x_ND: Tensor) -> Tensor:
        codes, scores = self.codes_and_scores(x_ND)
        y = gather_accumulate(codes, scores, self.get_buffer("tables"), self.row_scale)
        return (y if self.bias is None else y + self.bias).to(x_ND.dtype)
