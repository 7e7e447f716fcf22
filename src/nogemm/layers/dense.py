"""The dense feed-forward layer, gated or not: the baseline of the same interface, at any width; and no layer at all.

Legend: N tokens, D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import LayerConfig, Replaced, check_choice, check_int, register
from nogemm.cost import Cost
from nogemm.layers._base import FFN, PackedFFN, each_alone


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _squared_relu,
    "silu": F.silu,
    "swish": F.silu,
}
_TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


@register
@dataclass(frozen=True, kw_only=True)
class DenseConfig(LayerConfig["DenseFFN"]):
    """A dense FFN of width `hidden` (None: the width of the layer that is replaced)."""

    kind: ClassVar[str] = "dense"
    hidden: int | None = None
    activation: str | None = None

    def __post_init__(self) -> None:
        if self.hidden is not None:
            check_int("DenseConfig", "hidden", self.hidden, 1)
        if self.activation is not None:
            check_choice("DenseConfig", "activation", self.activation, tuple(ACTIVATIONS))

    def make(self, dense: Replaced) -> DenseFFN:
        return DenseFFN(
            self,
            dense.d_model,
            dense.d_out,
            hidden=dense.neurons(self.hidden),
            activation=self.activation or dense.activation,
            gated=dense.gated,
        )


class DenseFFN(FFN):
    """Two matrices with an activation between, or three in the gated form.

        y = W_down act(W_up x + b_up) + b_down          (plain)
        y = W_down (act(W_gate x + b_gate) * (W_up x + b_up)) + b_down          (gated)

    Cost: 2 F (D + d_out) FLOP per token, plus 2 F D for the gate; every weight is read once per call.
    """

    def __init__(
        self,
        config: DenseConfig,
        d_model: int,
        d_out: int | None = None,
        *,
        hidden: int,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(config, d_model, d_out)
        check_choice("DenseFFN", "activation", activation, tuple(ACTIVATIONS))
        self.hidden = hidden
        self.activation = activation
        self.gate = nn.Linear(d_model, hidden, bias=bias) if gated else None
        self.up = nn.Linear(d_model, hidden, bias=bias)
        self.down = nn.Linear(hidden, self.d_out, bias=bias)

    @classmethod
    def from_weights(
        cls,
        up_FD: Tensor,
        up_bias_F: Tensor | None,
        down_DF: Tensor,
        down_bias_D: Tensor | None,
        gate_FD: Tensor | None = None,
        gate_bias_F: Tensor | None = None,
        activation: str = "gelu",
    ) -> DenseFFN:
        """Wrap copies of dense weights, all [out, in]; absent biases become zeros."""
        hidden, d_model = up_FD.shape
        config = DenseConfig(hidden=hidden, activation=activation)
        layer = cls(config, d_model, down_DF.shape[0], hidden=hidden, activation=activation, gated=gate_FD is not None)
        layer = layer.to(up_FD.dtype)
        pairs = [(layer.up, up_FD, up_bias_F), (layer.down, down_DF, down_bias_D)]
        if layer.gate is not None and gate_FD is not None:
            pairs.append((layer.gate, gate_FD, gate_bias_F))
        with torch.no_grad():
            for linear, weight, bias in pairs:
                linear.weight.copy_(weight)
                linear.bias.zero_() if bias is None else linear.bias.copy_(bias)
        layer.fitted = "exact"
        return layer

    def hidden_activations(self, x_ND: Tensor) -> Tensor:
        """Return what the second matrix multiplies, [N, F]."""
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return act(self.up(x_ND))
        return act(self.gate(x_ND)) * self.up(x_ND)

    def tokens(self, x_ND: Tensor) -> Tensor:
        return each_alone(lambda x: self.down(self.hidden_activations(x)), x_ND)

    def cost(self, n_tokens: int = 1) -> Cost:
        linears = [linear for linear in (self.gate, self.up, self.down) if linear is not None]
        parts = [part for linear in linears for part in stored_of(linear)]
        matrices = self.hidden * (self.d_model * (1 if self.gate is None else 2) + self.d_out)
        read = sum(part.numel() * part.element_size() for part in parts)
        return Cost(2.0 * matrices * n_tokens, float(read if n_tokens else 0), sum(part.numel() for part in parts))

    def fit_dense(self, dense: DenseFFN) -> str:
        """Copy the dense layer if the widths are equal; otherwise keep the neurons with the largest weights."""
        if (self.gate is None) != (dense.gate is None) or self.activation != dense.activation:
            return self.fitted
        if self.hidden < dense.hidden:
            size = dense.up.weight.norm(dim=1) * dense.down.weight.norm(dim=0)
            chosen = size.topk(self.hidden).indices.sort().values
            self._take_neurons(dense, chosen)
            self.fitted = "closed-form"
        elif self.hidden == dense.hidden:
            self._take_neurons(dense, torch.arange(dense.hidden))
            self.fitted = "exact"
        return self.fitted

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Keep the best neurons on real activations, chosen one by one, and refit the second matrix.

        Each step takes the neuron that lowers the squared error of the refitted output most (forward selection on the
        Gram matrix of the hidden activations).
        """
        if self.fit_dense(dense) != "closed-form":
            return self.fitted
        with torch.no_grad():
            hidden_NF = dense.hidden_activations(x_ND).double()
            target_ND = hidden_NF @ dense.down.weight.T.double()
            mean_F, mean_D = hidden_NF.mean(0), target_ND.mean(0)
            centred = hidden_NF - mean_F
            gram_FF = centred.T @ centred
            ridge = (1e-6 * gram_FF.diagonal().mean()).clamp_min(1e-12)  # above 0 even if no activation varies
            gram_FF += ridge * torch.eye(dense.hidden, dtype=gram_FF.dtype)
            cross_FD = centred.T @ (target_ND - mean_D)
            chosen = forward_selection(gram_FF, cross_FD, self.hidden)
            self._take_neurons(dense, chosen)
            down_FD = torch.linalg.solve(gram_FF[chosen][:, chosen], cross_FD[chosen])
            self.down.weight.copy_(down_FD.T)
            self.down.bias.copy_(dense.down.bias + mean_D - mean_F[chosen] @ down_FD)
        return self.fitted

    def _take_neurons(self, dense: DenseFFN, chosen: Tensor) -> None:
        with torch.no_grad():
            self.up.weight.copy_(dense.up.weight[chosen])
            self.up.bias.copy_(dense.up.bias[chosen])
            if self.gate is not None and dense.gate is not None:
                self.gate.weight.copy_(dense.gate.weight[chosen])
                self.gate.bias.copy_(dense.gate.bias[chosen])
            self.down.weight.copy_(dense.down.weight[:, chosen])
            self.down.bias.copy_(dense.down.bias)

    def _pack(self, dtype: str) -> PackedFFN:
        return PackedDense(self, dtype)


def stored_of(linear: nn.Module) -> list[Tensor]:
    """Return weight [out, in] and, if there is one, bias [out] as they are stored: quantised by torch, or not."""
    parts = (linear.weight, linear.bias)
    # Of a quantised layer both are methods, which unpack what torch's kernels take.
    return [part for part in (part() if callable(part) else part for part in parts) if part is not None]


def weights_of(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight [out, in] and bias [out] as numbers to compute with, of a quantised layer too; no bias is zeros."""
    weight, *bias = (part.dequantize() if part.is_quantized else part for part in stored_of(linear))
    return weight, bias[0] if bias else weight.new_zeros(len(weight))


def forward_selection(gram_FF: Tensor, cross_FD: Tensor, count: int) -> Tensor:
    """Choose `count` columns one by one, each the one that lowers the least-squares error most.

    Args:
        gram_FF: A^T A, positive definite.
        cross_FD: A^T Y.
    Returns:
        sorted indices [count].
    Cost: O(count F (F + D)).
    """
    gram, cross = gram_FF.clone(), cross_FD.clone()
    left = torch.ones(gram.shape[0], dtype=torch.bool)
    for _ in range(count):
        gain = cross.square().sum(1) / gram.diagonal().clamp_min(1e-30)
        best = int(gain.masked_fill(~left, -1.0).argmax())
        left[best] = False
        # Remove from all others what the chosen column already explains (one step of elimination).
        factor_F = gram[:, best] / gram[best, best]
        factor_F[best] = 0.0
        cross -= factor_F.unsqueeze(1) * cross[best]
        gram -= torch.outer(factor_F, gram[best])
    return torch.nonzero(~left).flatten()


class PackedDense(PackedFFN):
    """The dense layer in another precision, by torch's own kernels: fp32, bf16, or dynamic int8.

    Dynamic int8 has one step for the activations of a whole call, so there a token's rounding depends on its batch.
    """

    def __init__(self, layer: DenseFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        copy = DenseFFN(
            DenseConfig(hidden=layer.hidden, activation=layer.activation),
            layer.d_model,
            layer.d_out,
            hidden=layer.hidden,
            activation=layer.activation,
            gated=layer.gate is not None,
            bias=layer.up.bias is not None,
        )
        copy.load_state_dict(layer.state_dict())
        copy.eval().requires_grad_(False)
        if dtype == "int8":
            copy = torch.ao.quantization.quantize_dynamic(copy, {nn.Linear}, dtype=torch.qint8)
        self.dense = copy.to(_TORCH_DTYPE.get(dtype, torch.float32))

    def tokens(self, x_ND: Tensor) -> Tensor:
        return self.dense.tokens(x_ND.to(self.dense.compute_dtype())).to(x_ND.dtype)


@register
@dataclass(frozen=True, kw_only=True)
class NoConfig(LayerConfig["NoFFN"]):
    """No FFN: a constant output, zero until fitted (the floor that every method must clear)."""

    kind: ClassVar[str] = "no"

    def make(self, dense: Replaced) -> NoFFN:
        return NoFFN(self, dense.d_model, dense.d_out)


class NoFFN(FFN):
    """Answer every token with the same trainable vector, y = bias.

    Cost: none; d_out parameters.
    """

    def __init__(self, config: NoConfig, d_model: int, d_out: int | None = None) -> None:
        super().__init__(config, d_model, d_out)
        self.bias = nn.Parameter(torch.zeros(self.d_out))

    def tokens(self, x_ND: Tensor) -> Tensor:
        # x * 0 gives x a gradient of zeros, and y its length: a traced graph would keep the length of its example.
        return each_alone(lambda x: self.bias + x[:, :1] * 0.0, x_ND)

    def cost(self, n_tokens: int = 1) -> Cost:
        touched = self.bias.numel() * self.bias.element_size() if n_tokens else 0
        return Cost(0.0, float(touched), self.bias.numel())

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Set the answer to the mean of the dense layer's outputs, the best constant."""
        with torch.no_grad():
            self.bias.copy_(dense.tokens(x_ND).mean(0))
        self.fitted = "closed-form"
        return self.fitted

    def _pack(self, dtype: str) -> PackedFFN:
        return PackedNo(self, dtype)


class PackedNo(PackedFFN):
    """The constant answer, for evaluation."""

    def __init__(self, layer: NoFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.register_buffer("bias", layer.bias.detach().clone(), persistent=False)

    def tokens(self, x_ND: Tensor) -> Tensor:
        bias: Tensor = self.get_buffer("bias")
        return each_alone(lambda x: bias.to(x.dtype) + x[:, :1] * 0.0, x_ND)
