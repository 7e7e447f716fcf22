"""What several layers add to training: a loss of their own, and the published baselines' dropout."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of the published baselines: inside the layer, and of its output before the network around it drops once more.
PUBLISHED_DROPOUT = 0.1


class _Attach(torch.autograd.Function):
    """Pass the carrier through; send a gradient of one to the loss."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grad[0], torch.ones_like(loss)


def attach_loss(carrier: Tensor, loss: Tensor) -> Tensor:
    """Return `carrier`; its backward also adds the gradient of `loss`, so that no trainer has to know of it."""
    return _Attach.apply(carrier, loss)  # type: ignore[no-any-return]


def drop_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Drop a module's input as the published baselines do; a forward pre-hook."""
    return (F.dropout(inputs[0], PUBLISHED_DROPOUT, module.training), *inputs[1:])
