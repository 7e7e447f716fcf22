"""A loss of a layer's own, added to whatever the layer is trained for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
