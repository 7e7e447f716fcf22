"""Neurons of packed layers: stored once, computed for the tokens that a mask names, or all at once.

What SLIDE, MONGOOSE and Switch evaluate with.

Legend: N tokens, D width, F neurons, E output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.neurons.all import AllNeurons, dense_us, rows_us
from nogemm.ops import native_available
from nogemm.ops._packing import quantise_rows
from nogemm.ops.packed_hire import HireWeights, pack_hire, packed_neurons


class NeuronStore(AllNeurons):
    """The neurons of dense layers side by side, rows rounded to fp32, bf16, or int8 with a scale per row.

        y[n] = sum over the neurons i of token n of act(<x[n], up_i> + up_bias_i) down_i     (gated: as in `DenseFFN`)

    Few neurons run in one native call that reads the named rows alone; many run as one masked product over all; which
    are few says the machine (`nogemm.hardware.speeds`). Without the extension there is only the second. Output biases
    are the caller's.
    """

    def __init__(self, layers: Sequence[DenseFFN], dtype: str) -> None:
        first = layers[0]
        gates = [layer.gate for layer in layers if layer.gate is not None]
        down_FE = torch.cat([layer.down.weight.detach().T for layer in layers]).float()
        gate, gate_bias = _joined(gates) if gates else (None, None)
        up, up_bias = _joined([layer.up for layer in layers])
        native, packed = native_available(), None
        if native:
            hidden = len(layers) * first.hidden
            weights = HireWeights(
                gate=gate,
                gate_bias=gate_bias,
                up=up,
                up_bias=up_bias,
                down=down_FE,
                bias=torch.zeros(first.d_out),
                activation=first.activation,
                kept=hidden,
                candidates=hidden,
            )
            packed = pack_hire(weights, dtype)
        super().__init__(packed, (gate_bias, up_bias), ACTIVATIONS[first.activation])
        self.native, self.dtype, self.d_out = native, dtype, first.d_out
        self.numbers = up.shape[1] * (1 + self.gated) + first.d_out  # of one neuron
        if not native:
            for name, rows in (("gate", gate), ("up", up), ("down", down_FE)):
                stored, scale = (rows, None) if rows is None or dtype == "fp32" else quantise_rows(rows, dtype)
                self.register_buffer(f"{name}_rows", stored, persistent=False)
                self.register_buffer(f"{name}_scale", scale, persistent=False)

    def forward(self, x_ND: Tensor, mask_NF: Tensor, path: str = "auto") -> Tensor:
        """Answer float32 tokens by the neurons that the mask names for each; a token that is not finite gives NaN."""
        if self.native and (path == "rows" or (path == "auto" and self._few(mask_NF))):
            return self.named(x_ND, mask_NF)
        return self.masked(x_ND, mask_NF)

    def named(self, x_ND: Tensor, mask_NF: Tensor) -> Tensor:
        """Read the rows of the named neurons alone; native only."""
        return packed_neurons(x_ND, self.get_buffer("packed"), self.d_out, mask_NF)

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        if self.native:
            return super().stored(name)
        return self.get_buffer(f"{name}_rows"), self._buffers[f"{name}_scale"]

    def _few(self, mask_NF: Tensor) -> bool:
        n_tokens, neurons = mask_NF.shape
        all_us = dense_us(self.dtype, n_tokens, neurons * self.numbers)
        return rows_us(self.dtype, n_tokens, int(mask_NF.sum()) * self.numbers) <= all_us


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Stack weights and biases; a missing bias is 0."""
    weight = torch.cat([linear.weight.detach() for linear in linears]).float()
    biases = [torch.zeros(len(one.weight)) if one.bias is None else one.bias.detach() for one in linears]
    return weight, torch.cat(biases).float()
