"""What every projection is: a linear map with a bias, a cost, and a way to be written out as one matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from nogemm.config import ProjectionConfig
from nogemm.cost import Cost


class Projection(nn.Module, ABC):
    """A trainable linear map from width `d_in` to width `d_out`, used to hash or to route.

    Attributes:
        weight: the map's numbers, or the first part of them; a buffer where nothing is trained.
    """

    config: ProjectionConfig
    weight: Tensor
    bias: Tensor | None

    def __init__(self, config: ProjectionConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        self.config = config
        self.d_in = d_in
        self.d_out = d_out

    @abstractmethod
    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [N, d_in] to [N, d_out]."""

    @abstractmethod
    def cost(self, itemsize: int) -> Cost:
        """Return FLOP for one token, and the bytes of the weights, read once whatever the number of tokens."""

    @abstractmethod
    def reset_parameters(self, init: str) -> None:
        """Draw the weights: "scaled" gives unit-variance outputs for unit-variance inputs, "reference" as published."""

    def weights(self) -> list[nn.Parameter]:
        """Return the trainable parameters except the bias."""
        return [parameter for name, parameter in self.named_parameters() if name != "bias"]

    def freeze(self) -> None:
        """Turn the weights and the bias into buffers: part of the state, never trained."""
        for name, parameter in list(self.named_parameters()):
            delattr(self, name)
            self.register_buffer(name, parameter.detach())

    def dense_matrix(self) -> Tensor:
        """Return the [d_out, d_in] matrix that this projection multiplies by (for tests and studies)."""
        weight = self.weight
        eye = torch.eye(self.d_in, dtype=weight.dtype, device=weight.device)
        y = self(eye)
        return (y if self.bias is None else y - self.bias).T

    def extra_repr(self) -> str:
        return f"{self.d_in} -> {self.d_out}, {self.config}"
