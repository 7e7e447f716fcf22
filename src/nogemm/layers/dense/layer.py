"""The dense feed-forward layer, gated or not: the baseline of the same interface, at any width; and no layer at all.

Legend: N tokens, D width, F hidden width.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS, cutoff
from nogemm.config import check_choice, layer_of
from nogemm.cost import Cost
from nogemm.layers._base import FFN, Route
from nogemm.layers._tokens import each_alone
from nogemm.layers.dense.config import DenseConfig
from nogemm.layers.dense.fit import forward_selection
from nogemm.ops._packing import rounded_rows
from nogemm.shape import FFNShape


@layer_of(DenseConfig)
class DenseFFN(FFN):
    """Two matrices with an activation between, or three in the gated form.

        y = W_down act(W_up x + b_up) + b_down          (plain)
        y = W_down (act(W_gate x + b_gate) * (W_up x + b_up)) + b_down          (gated)

    Where the network has a sparsity of its own (`FFNShape.sparsity`), act(s) is act(max(s - cutoff, 0)).

    Cost: 2 F (D + d_out) FLOP per token, plus 2 F D for the gate; every weight is read once per call.
    """

    dynamic_int8 = True
    has_cutoff = True

    def __init__(self, config: DenseConfig, shape: FFNShape, *, bias: bool = True) -> None:
        super().__init__(config, shape)
        self.config: DenseConfig = config
        self.hidden = shape.neurons(config.hidden)
        self.activation = config.activation or shape.activation
        check_choice("DenseFFN", "activation", self.activation, tuple(ACTIVATIONS))
        self.gate = nn.Linear(self.d_model, self.hidden, bias=bias) if shape.gated else None
        self.up = nn.Linear(self.d_model, self.hidden, bias=bias)
        self.down = nn.Linear(self.hidden, self.d_out, bias=bias)

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
        sparsity: float = 0.0,
    ) -> DenseFFN:
        """Wrap copies of dense weights, all [out, in]; absent biases become zeros."""
        hidden, d_model = up_FD.shape
        shape = FFNShape(
            d_in=d_model,
            d_out=down_DF.shape[0],
            hidden=hidden,
            activation=activation,
            gated=gate_FD is not None,
            sparsity=sparsity,
        )
        layer = cls(DenseConfig(hidden=hidden), shape).to(up_FD.dtype)
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
            return act(self._above(self.up(x_ND)))
        return act(self._above(self.gate(x_ND))) * self.up(x_ND)

    def _above(self, scores_NF: Tensor) -> Tensor:
        sparsity = self.shape.sparsity
        return torch.relu(scores_NF - cutoff(scores_NF, 1.0 - sparsity)) if sparsity else scores_NF

    def routes(self, x_ND: Tensor) -> Route:
        """Name all neurons: a dense layer reads them for every token."""
        return Route(torch.arange(self.hidden).expand(len(x_ND), -1), self.hidden_activations(x_ND))

    def tokens(self, x_ND: Tensor) -> Tensor:
        return each_alone(lambda x: self.down(self.hidden_activations(x)), x_ND)

    def cost(self, n_tokens: int = 1) -> Cost:
        linears = [linear for linear in (self.gate, self.up, self.down) if linear is not None]
        parts = [part for linear in linears for part in stored_of(linear)]
        matrices = self.hidden * (self.d_model * (1 if self.gate is None else 2) + self.d_out)
        read = sum(part.numel() * part.element_size() for part in parts)
        return Cost(2.0 * matrices * n_tokens, float(read if n_tokens else 0), sum(part.numel() for part in parts))

    def output_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.down.weight, self.down.bias) if isinstance(p, nn.Parameter)]

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


LayerT = TypeVar("LayerT", bound=FFN)


@torch.no_grad()
def round_dense(layer: LayerT) -> LayerT:
    """Round the in-rows and out-rows of all dense layers inside, in place, to int8 with a scale per neuron."""
    for dense in layer.modules():
        if isinstance(dense, DenseFFN):
            for linear in (dense.gate, dense.up):
                if linear is not None:
                    linear.weight.copy_(rounded_rows(linear.weight, 8))
            dense.down.weight.copy_(rounded_rows(dense.down.weight.T, 8).T)
    return layer


def stored_of(linear: nn.Module) -> list[Tensor]:
    """Return weight [out, in] and, if there is one, bias [out] as they are stored: quantised by torch, or not."""
    parts = (linear.weight, linear.bias)
    # Of a quantised layer both are methods, which unpack what torch's kernels take.
    return [part for part in (part() if callable(part) else part for part in parts) if part is not None]


def weights_of(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight [out, in] and bias [out] as numbers to compute with, of a quantised layer too; no bias is zeros."""
    weight, *bias = (part.dequantize() if part.is_quantized else part for part in stored_of(linear))
    return weight, bias[0] if bias else weight.new_zeros(len(weight))
