"""The linear map in another precision, by torch's own kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nogemm.layers._base import PackedFFN, packed_of
from nogemm.layers.linear.layer import LinearFFN

_TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@packed_of(LinearFFN)
class PackedLinear(PackedFFN):
    """The map in fp32, bf16, or torch's dynamic int8, which has one step for the activations of a whole call."""

    def __init__(self, layer: LinearFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        copy = LinearFFN(layer.config, layer.shape)
        copy.load_state_dict(layer.state_dict())
        copy.eval().requires_grad_(False)
        if dtype == "int8":
            copy = torch.ao.quantization.quantize_dynamic(copy, {nn.Linear}, dtype=torch.qint8)
        self.linear = copy.to(_TORCH_DTYPE.get(dtype, torch.float32))

    def tokens(self, x_ND: Tensor) -> Tensor:
        return self.linear.tokens(x_ND.to(self.linear.compute_dtype())).to(x_ND.dtype)
