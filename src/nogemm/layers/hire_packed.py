"""HireFFN packed for evaluation: one native call per layer, or the same steps in PyTorch without the extension."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nogemm.layers._base import PackedFFN
from nogemm.layers.hire_sketch import deviations
from nogemm.ops import native_available
from nogemm.ops.packed_hire import KERNEL_NAMES, HireWeights, pack_hire, packed_hire

if TYPE_CHECKING:
    from nogemm.layers.hire import HireFFN


class PackedHire(PackedFFN):
    """The evaluation twin of a HireFFN.

    dtype "fp32", "bf16", or "int8" with a scale per row: how the rows that are computed exactly are stored. The sketch
    is the layer's own. Sums are float32 (of int8 rows with 16-bit fixed-point tokens, exact integers); y has x's dtype.
    A neuron's rows lie side by side, so its weights are in memory once, beside the sketch.
    """

    def __init__(self, layer: HireFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.native = native_available()
        if self.native:
            with torch.no_grad():
                self.register_buffer("packed", pack_hire(_weights(layer), dtype), persistent=False)
        else:
            self.portable = layer.rounded(dtype)

    def tokens(self, x_ND: Tensor) -> Tensor:
        if self.native:
            return packed_hire(x_ND, self.get_buffer("packed"), self.d_out)
        return self.portable(x_ND)


def _weights(layer: HireFFN) -> HireWeights:
    """Collect what the kernel packs."""
    config = layer.config
    groups = -(-layer.hidden // config.group)
    wide = min(1.0, config.keep * config.oversample)
    everything = {"topk": layer.candidates >= groups, "statistical": wide >= 1, "active": config.keep >= 1}
    sketch = None if everything[config.select] else layer.sketch()
    marginal = sketch is not None and config.select == "active"
    error, size = sketch.margin_factors(layer.d_model) if sketch is not None and marginal else (None, None)
    return HireWeights(
        gate=layer.gate,
        gate_bias=layer.gate_bias,
        up=layer.up,
        up_bias=layer.up_bias,
        down=layer.down,
        bias=layer.bias,
        activation=KERNEL_NAMES.get(layer.activation, layer.activation),
        up_relu=layer.activation == "drelu",
        key=layer.key,
        select=config.select,
        group=config.group,
        kept=layer.kept,
        candidates=layer.candidates,
        always=layer.always,
        keep_z=deviations(config.keep),
        wide_z=deviations(wide),
        codes=None if sketch is None else sketch.codes_FR,
        scale=None if sketch is None else sketch.scale_F,
        reduce=None if sketch is None else sketch.reduce_RD,
        error=error,
        size=size,
        nibbles=config.sketch == "int4" and not layer.training,
    )
