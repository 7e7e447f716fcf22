"""The matrices that conversion leaves as they are, attention's above all, rounded to int8 while a model is packed.

The products are those of HireFFN's int8 sketch. Beside torch's own int8 products (FBGEMM) a token takes less time, as
one call rounds, multiplies and scales, a long prompt a little more; and they give equal bits for any batch, number of
threads and instruction set.

Legend: N tokens, D inputs, E outputs.
"""

from __future__ import annotations

from torch import Tensor, nn

from nogemm.errors import PackedError
from nogemm.heads import output_embeddings
from nogemm.layers import FFN, PackedFFN
from nogemm.layers._base import KERNEL_DTYPES
from nogemm.layers._tokens import each_alone
from nogemm.layers.hire.sketch import quantise_neurons
from nogemm.ops import native_available
from nogemm.ops.packed_hire import pack_linear, packed_hire
from nogemm.ops.sketch_and_select import sketch_scores


class Int8Linear(nn.Module):
    """A linear layer for evaluation, its matrix in int8 with a scale per row.

        y[n, e] = size[n] scale[e] sum_d code[e, d] round(x[n, d] / size[n]) + bias[e]
        size[n] = max_d |x[n, d]| / 127

    Each token is rounded to 8 bits with a scale of its own: what it becomes does not depend on its batch, in decoding
    as in a prompt. Sums are exact integers. A token that is not finite gives NaN. y has x's dtype.

    Args:
        linear: what it stands for; not changed.
        keep: hold on to it for `restore_body`.
    Cost: 2 N D E operations, D E bytes of weights.
    """

    def __init__(self, linear: nn.Linear, keep: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.source = (linear,) if keep else ()  # no child: it must not show in parameters()
        codes_ED, scale_E = quantise_neurons(linear.weight, 8)
        bias_E = None if linear.bias is None else linear.bias.detach().float()
        self.native = native_available()
        packed = pack_linear(codes_ED, scale_E, bias_E) if self.native else None
        portable = (None, None, None) if self.native else (codes_ED, scale_E, bias_E)
        for name, values in zip(("packed", "codes", "scale", "bias"), (packed, *portable), strict=True):
            self.register_buffer(name, values, persistent=False)
        self.training = False

    def train(self, mode: bool = True) -> Int8Linear:
        if mode:
            raise PackedError("Int8Linear is for evaluation only; train the unpacked model")
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., E]."""
        x_ND = x.reshape(-1, self.in_features)
        if self.native:
            x_ND = x_ND if x_ND.dtype in KERNEL_DTYPES else x_ND.float()
            y_NE = packed_hire(x_ND, self.get_buffer("packed"), self.out_features)
        else:
            y_NE = each_alone(self._portable, x_ND.float())
        return y_NE.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def _portable(self, x_ND: Tensor) -> Tensor:
        return sketch_scores(x_ND, self.get_buffer("codes"), self.get_buffer("scale"), self._buffers["bias"])

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, int8"


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
