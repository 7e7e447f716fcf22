"""Neurons of packed layers: stored once, computed for the tokens that a mask names, or all at once.

What SLIDE, MONGOOSE and Switch evaluate with.

Legend: N tokens, D width, F neurons, E output width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.layers.dense import ACTIVATIONS, DenseFFN
from nogemm.ops import native_available
from nogemm.ops._packing import quantise_rows
from nogemm.ops.packed_hire import KERNEL_NAMES, HireWeights, pack_hire, packed_neurons, packed_rows

_FEW_TOKENS = 64  # above this many nobody counts how many neurons a mask names
# Uses of each neuron above which all of them at once are cheaper; rows that are not float32 are widened for that.
_FEW_USES = {"fp32": 8, "bf16": 16, "int8": 32}


class NeuronStore(nn.Module):
    """The neurons of dense layers side by side, rows rounded to fp32, bf16, or int8 with a scale per row.

        y[n] = sum over the neurons i of token n of act(<x[n], up_i> + up_bias_i) down_i     (gated: as in `DenseFFN`)

    Few neurons run in one native call that reads the named rows alone; many run as one masked product over all. Without
    the extension there is only the second. Output biases are the caller's.
    """

    def __init__(self, layers: Sequence[DenseFFN], dtype: str) -> None:
        super().__init__()
        first = layers[0]
        self.activation, self.hidden, self.d_out = first.activation, len(layers) * first.hidden, first.d_out
        gates = [layer.gate for layer in layers if layer.gate is not None]
        ups = [layer.up for layer in layers]
        down_FE = torch.cat([layer.down.weight.detach().T for layer in layers]).float()
        gate, gate_bias = _joined(gates) if gates else (None, None)
        up, up_bias = _joined(ups)
        self.gated = gate is not None
        self.native = native_available()
        self.few_uses = _FEW_USES[dtype] * self.hidden
        self.register_buffer("up_bias", up_bias, persistent=False)
        self.register_buffer("gate_bias", gate_bias, persistent=False)
        if self.native:
            weights = HireWeights(
                gate=gate,
                gate_bias=gate_bias,
                up=up,
                up_bias=up_bias,
                down=down_FE,
                bias=torch.zeros(self.d_out),
                activation=KERNEL_NAMES.get(self.activation, self.activation),
                kept=self.hidden,
                candidates=self.hidden,
            )
            self.register_buffer("packed", pack_hire(weights, dtype), persistent=False)
            return
        for name, rows in (("gate", gate), ("up", up), ("down", down_FE)):
            stored, scale = (rows, None) if rows is None or dtype == "fp32" else quantise_rows(rows, dtype)
            self.register_buffer(f"{name}_rows", stored, persistent=False)
            self.register_buffer(f"{name}_scale", scale, persistent=False)

    def forward(self, x_ND: Tensor, mask_NF: Tensor) -> Tensor:
        """Answer float32 tokens by the neurons that the mask names for each; a token that is not finite gives NaN."""
        if self.native and len(x_ND) <= _FEW_TOKENS and int(mask_NF.sum()) <= self.few_uses:
            return self.named(x_ND, mask_NF)
        hidden_NF = torch.where(mask_NF, self._hidden(x_ND, slice(None)), 0.0)
        y_NE = hidden_NF @ self._wide("down", slice(None))
        return torch.where(x_ND.isfinite().all(1, keepdim=True), y_NE, float("nan"))

    def named(self, x_ND: Tensor, mask_NF: Tensor) -> Tensor:
        """Read the rows of the named neurons alone; native only."""
        return packed_neurons(x_ND, self.get_buffer("packed"), self.d_out, mask_NF)

    def part(self, x_ND: Tensor, neurons: slice) -> Tensor:
        """Answer all tokens by the same range of neurons."""
        return self._hidden(x_ND, neurons) @ self._wide("down", neurons)

    def selector(self, x_ND: Tensor) -> Tensor:
        """Return the pre-activations of all gates (of a plain layer's neurons), [N, F]."""
        name = "gate" if self.gated else "up"
        return F.linear(x_ND, self._wide(name, slice(None)), self.get_buffer(f"{name}_bias"))

    def _hidden(self, x_ND: Tensor, neurons: slice) -> Tensor:
        up_NF = F.linear(x_ND, self._wide("up", neurons), self.get_buffer("up_bias")[neurons])
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return act(up_NF)
        return act(F.linear(x_ND, self._wide("gate", neurons), self.get_buffer("gate_bias")[neurons])) * up_NF

    def _wide(self, name: str, neurons: slice) -> Tensor:
        """Return rows in float32."""
        if self.native:
            rows, scale = packed_rows(self.get_buffer("packed"))[name]
        else:
            rows, scale = self.get_buffer(f"{name}_rows"), self._buffers[f"{name}_scale"]
        wide = rows[neurons].float()
        return wide if scale is None else wide * scale[neurons].unsqueeze(1)


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Stack weights and biases; a missing bias is 0."""
    weight = torch.cat([linear.weight.detach() for linear in linears]).float()
    biases = [torch.zeros(len(one.weight)) if one.bias is None else one.bias.detach() for one in linears]
    return weight, torch.cat(biases).float()
