"""The matrices that conversion leaves as they are, attention's above all, rounded to int8 while a model is packed.

The products are torch's (its dynamic quantisation). What is added here are a scale per row, a scale per token, tokens
that are not finite, and the way back.

Legend: N tokens, D inputs, E outputs.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.errors import PackedError
from nogemm.heads import output_embeddings
from nogemm.layers import FFN, PackedFFN
from nogemm.layers._base import each_alone

_LARGEST = 127  # of a weight's code


class Int8Linear(nn.Module):
    """A linear layer for evaluation, its matrix in int8 with a scale per row.

        y[n, e] = size[n] scale[e] sum_d code[e, d] round(x[n, d] / size[n]) + bias[e]      size[n] = max_d |x[n, d]|

    Tokens are rounded to 8 bits (7 where the processor adds products in 16 bits), each with a scale of its own: what a
    token becomes does not depend on its batch, in decoding as in a prompt. A token that is not finite gives NaN. y has
    x's dtype.

    Args:
        linear: what it stands for; not changed.
        keep: hold on to it for `restore_body`.
    Cost: 2 N D E operations, D E bytes of weights.
    """

    def __init__(self, linear: nn.Linear, keep: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.source = (linear,) if keep else ()  # no child: it must not show in parameters()
        weight_ED = linear.weight.detach().float()
        scale_E = weight_ED.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
        bias_E = None if linear.bias is None else linear.bias.detach().float()
        self.packed = _prepacked(weight_ED, scale_E)
        self.register_buffer("bias", bias_E, persistent=False)
        self.training = False

    def train(self, mode: bool = True) -> Int8Linear:
        if mode:
            raise PackedError("Int8Linear is for evaluation only; train the unpacked model")
        return self

    def weight(self) -> Tensor:
        """Return the rounded matrix, a quantised tensor [E, D]: a method, as in torch's own quantised layers."""
        return torch.ops.quantized.linear_unpack(self.packed)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., E]."""
        x_ND = x.reshape(-1, self.in_features).float()
        return each_alone(self._products, x_ND).to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _products(self, x_ND: Tensor) -> Tensor:
        size_N1 = x_ND.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        most = _LARGEST // 2 if reduced() else _LARGEST  # of a token's code; codes are stored with most + 1 added
        y_NE = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x_ND / size_N1, 1.0 / most, most + 1, self.packed
        )
        bias_E = self._buffers["bias"]
        return y_NE * size_N1 if bias_E is None else torch.addcmul(bias_E, y_NE, size_N1)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int8"


def _prepacked(weight_ED: Tensor, scale_E: Tensor) -> Any:
    """Round a matrix and lay it out for torch's int8 products."""
    with warnings.catch_warnings():
        # torch announces that another package will take this over; it is the fastest of its int8 products today.
        warnings.simplefilter("ignore")
        zero_E = torch.zeros(len(scale_E), dtype=torch.long)
        codes_ED = torch.quantize_per_channel(weight_ED, scale_E.double(), zero_E, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack(codes_ED, None)


@functools.cache
def reduced() -> bool:
    """Tell whether torch's int8 products overflow on this processor unless tokens have 7 bits: asked by a product."""
    packed = _prepacked(torch.full((8, 64), 127.0), torch.ones(8))
    found = torch.ops.quantized.linear_dynamic(torch.full((4, 64), 255.0), packed, False)
    return float(found[0, 0]) < 0.999 * 64 * 127 * 255


def round_body(model: nn.Module, keep: bool) -> list[str]:
    """Put an `Int8Linear` in the place of every plain linear layer of a model, one at a time; return their paths.

    Left as they are: our layers, the vocabulary head, which is tied to an embedding or has codes of its own, layers
    with hooks, and subclasses of nn.Linear, which may compute something else.
    """
    ours = {id(part) for one in model.modules() if isinstance(one, (FFN, PackedFFN)) for part in one.modules()}
    ours.add(id(output_embeddings(model)))
    made: dict[int, Int8Linear] = {}
    paths = []
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is not nn.Linear or id(module) in ours or not path or _watched(module):
            continue
        if id(module) not in made:
            made[id(module)] = Int8Linear(module, keep)
        model.set_submodule(path, made[id(module)])
        paths.append(path)
    return paths


def restore_body(model: nn.Module) -> None:
    """Put the layers back that `round_body` kept."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Int8Linear) and module.source:
            model.set_submodule(path, module.source[0])


def rounded_parts(model: nn.Module) -> list[Int8Linear]:
    """List the layers of a model that are rounded now."""
    return [module for module in model.modules() if isinstance(module, Int8Linear)]


def _watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
