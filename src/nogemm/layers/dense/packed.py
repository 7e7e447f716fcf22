"""The dense layer in another precision, by torch's own kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nogemm.layers._base import PackedFFN, packed_of
from nogemm.layers.dense.layer import DenseFFN

_TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@packed_of(DenseFFN)
class PackedDense(PackedFFN):
    """The dense layer in another precision, by torch's own kernels: fp32, bf16, or dynamic int8.

    Dynamic int8 has one step for the activations of a whole call, so there a token's rounding depends on its batch.
    """

    def __init__(self, layer: DenseFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        copy = DenseFFN(layer.config, layer.shape, bias=layer.up.bias is not None)
        copy.load_state_dict(layer.state_dict())
        copy.eval().requires_grad_(False)
        if dtype == "int8":
            copy = torch.ao.quantization.quantize_dynamic(copy, {nn.Linear}, dtype=torch.qint8)
        self.dense = copy.to(_TORCH_DTYPE.get(dtype, torch.float32))

    def tokens(self, x_ND: Tensor) -> Tensor:
        return self.dense.tokens(x_ND.to(self.dense.compute_dtype())).to(x_ND.dtype)
