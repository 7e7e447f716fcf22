"""TreeFFN packed for evaluation: one native call per layer, or the same arithmetic in PyTorch without the extension."""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.layers._base import KERNEL_DTYPES, Kernel, PackedFFN, Route, packed_of
from nogemm.layers.tree.layer import TreeFFN
from nogemm.ops import native_available
from nogemm.ops.packed_tree import TreeWeights, pack_tree, packed_tree_rows

# Looked up once, and not kept on the layer: an operator cannot be pickled.
_PACKED_TREE = torch.ops.nogemm.packed_tree.default


@packed_of(TreeFFN)
class PackedTree(PackedFFN):
    """The evaluation twin of a TreeFFN.

    dtype "fp32": everything float32. "bf16": in-rows and out-rows bfloat16. "int8": out-rows int8 with a scale per row;
    in-rows stay bfloat16, because they decide the path. Biases and sums are float32 always; y has x's dtype.

    With the native extension the weights live in one buffer, a record per node; it is neither a parameter nor saved.
    """

    def __init__(self, layer: TreeFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.native = native_available()
        self.visited = layer.config.trees * layer.levels
        if self.native:
            self.register_buffer("packed", pack_tree(_weights(layer), dtype), persistent=False)
        else:
            self.portable = layer.rounded(dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Most of a small call is Python: what is ready for the kernel goes there without another look.
        if self.native and x.dtype in KERNEL_DTYPES and x.shape[-1:] == (self.d_model,) and not torch.is_grad_enabled():
            return _PACKED_TREE(x, self._buffers["packed"], self.d_out)
        return super().forward(x)

    @property
    def kernel(self) -> Kernel | None:
        return Kernel(number=1, phases=("descent", "sum")) if self.native else None

    def routes(self, x_ND: Tensor) -> Route:
        if not self.native:
            return self.portable.route(x_ND)
        return Route(packed_tree_rows(x_ND, self.get_buffer("packed"), self.visited), None)

    def tokens(self, x_ND: Tensor) -> Tensor:
        if self.native:
            return _PACKED_TREE(x_ND, self._buffers["packed"], self.d_out)
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
