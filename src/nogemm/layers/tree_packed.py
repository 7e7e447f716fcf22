"""TreeFFN packed for evaluation: one native call per layer, or the same arithmetic in PyTorch without the extension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nogemm.layers._base import PackedFFN
from nogemm.ops import native_available
from nogemm.ops._packing import quantise_rows
from nogemm.ops.packed_tree import TreeWeights, pack_tree

if TYPE_CHECKING:
    from nogemm.layers.tree import TreeFFN

# Looked up once, and not kept on the layer: an operator cannot be pickled.
_PACKED_TREE = torch.ops.nogemm.packed_tree.default
_NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


class PackedTree(PackedFFN):
    """The evaluation twin of a TreeFFN.

    dtype "fp32": everything float32. "bf16": in-rows and out-rows bfloat16. "int8": out-rows int8 with a scale per row;
    in-rows stay bfloat16, because they decide the path. Biases and sums are float32 always; y has x's dtype.

    With the native extension the weights live in one buffer, a record per node; it is neither a parameter nor saved.
    """

    def __init__(self, layer: TreeFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.native = native_available()
        if self.native:
            self.register_buffer("packed", pack_tree(_weights(layer), dtype), persistent=False)
        else:
            self.portable = round_tree(layer, dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Most of a small call is Python: what is ready for the kernel goes there without another look.
        if (
            self.native
            and x.dtype in _NATIVE_DTYPES
            and x.shape[-1:] == (self.d_model,)
            and not torch.is_grad_enabled()
        ):
            return _PACKED_TREE(x, self._buffers["packed"], self.d_out)
        return super().forward(x)

    def tokens(self, x_ND: Tensor) -> Tensor:
        if self.native:
            known = x_ND if x_ND.dtype in _NATIVE_DTYPES else x_ND.float()
            return _PACKED_TREE(known, self._buffers["packed"], self.d_out).to(x_ND.dtype)
        return self.portable(x_ND)


def _weights(layer: TreeFFN) -> TreeWeights:
    return TreeWeights(
        activation=layer.activation,
        in_rows=layer.weight_in,
        out_rows=layer.weight_out,
        bias=layer.bias_in,
        threshold=layer.threshold,
        core_in=layer.core_in,
        core_bias=layer.core_in_bias,
        core_out=layer.core_out,
        out_bias=layer.bias,
    )


@torch.no_grad()
def round_tree(layer: TreeFFN, dtype: str) -> TreeFFN:
    """Return a float32 copy of the layer whose weights are rounded as `pack(dtype)` rounds them."""
    from nogemm.layers.tree import TreeFFN

    twin = TreeFFN(layer.config, layer.d_model, layer.d_out, activation=layer.activation)
    twin.load_state_dict(layer.state_dict())
    for name in ("weight_in", "core_in", "weight_out", "core_out"):
        weight = getattr(twin, name)
        if weight is None or dtype == "fp32":
            continue
        if dtype == "int8" and name.endswith("out"):
            rows, scale = quantise_rows(weight, "int8")
            assert scale is not None
            weight.copy_(rows.float() * scale.unsqueeze(-1))
        else:
            weight.copy_(weight.bfloat16())
    return twin.eval().requires_grad_(False)
