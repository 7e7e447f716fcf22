"""No layer at all: a constant answer, the floor that every method must clear."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nogemm.config import layer_of
from nogemm.cost import Cost
from nogemm.layers._base import FFN
from nogemm.layers._tokens import each_alone
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.no.config import NoConfig
from nogemm.shape import FFNShape


@layer_of(NoConfig)
class NoFFN(FFN):
    """Answer every token with the same trainable vector, y = bias.

    Cost: none; d_out parameters.
    """

    def __init__(self, config: NoConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.bias = nn.Parameter(torch.zeros(self.d_out))

    def tokens(self, x_ND: Tensor) -> Tensor:
        # x * 0 gives x a gradient of zeros, and y its length: a traced graph would keep the length of its example.
        return each_alone(lambda x: self.bias + x[:, :1] * 0.0, x_ND)

    def cost(self, n_tokens: int = 1) -> Cost:
        touched = self.bias.numel() * self.bias.element_size() if n_tokens else 0
        return Cost(0.0, float(touched), self.bias.numel())

    def output_parameters(self) -> list[nn.Parameter]:
        return [self.bias]

    def rounded(self, dtype: str) -> NoFFN:
        """Return a copy: the packed vector is not rounded."""
        return copy.deepcopy(self)

    @torch.no_grad()
    def solve(self, x_ND: Tensor, y_ND: Tensor) -> float:
        self.bias.copy_(y_ND.mean(0))
        return 1.0

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Set the answer to the mean of the dense layer's outputs, the best constant."""
        with torch.no_grad():
            self.bias.copy_(dense.tokens(x_ND).mean(0))
        self.fitted = "closed-form"
        return self.fitted
