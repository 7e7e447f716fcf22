"""Channel shuffle: two block-diagonal matrices with a fixed permutation of the hidden channels between.

Legend: N tokens, D width, B block width, n groups, F hidden width, H = F / n hidden channels of a group.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.config import check_choice, layer_of
from nogemm.cost import Cost
from nogemm.errors import ConfigError
from nogemm.layers._base import FFN
from nogemm.layers._tokens import each_alone
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.shuffle.config import ShuffleConfig
from nogemm.ops import block_product
from nogemm.shape import FFNShape


@layer_of(ShuffleConfig)
class ShuffleFFN(FFN):
    """Work in groups of channels, and deal the hidden channels round so that each group hears of every other.

        u_g = up_g v_g                      for each of n groups of B inputs, v = norm(x)
        h = act(shuffle(u) + up_bias)       place j of group g goes to place j n + g
        y_g = down_g h_g;   y + bias

    Widths that do not divide are padded: inputs with zeros to n B, n = ceil(D / B), hidden and output channels up to a
    multiple of n, cut at the end.

    | parameter | shape |
    |---|---|
    | up, up_bias | [n, H, B], [n H] in shuffled order |
    | down, bias | [n, ceil(d_out / n), H], [d_out] |
    | norm.weight, norm.bias | [D], if `norm` |

    Wins as a drop-in of 1/n of the arithmetic and of the memory of a dense layer, at every batch. Loses accuracy: each
    hidden channel sees B inputs only.

    Source: ShuffleNet (Zhang et al., 2018) as the baseline of LookupFFN (Zeng et al., 2023). Differs, unless
    `faithful`, in the norm, which the baseline forgot, and in the initial scale.
    """

    dynamic_int8 = True

    def __init__(self, config: ShuffleConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: ShuffleConfig = config
        d_model, hidden = self.d_model, shape.neurons(config.hidden)
        activation = config.activation or shape.activation
        if config.block > d_model:
            raise ConfigError(f"ShuffleConfig: block={config.block} is wider than the input, d_model={d_model}")
        if config.faithful and (d_model % config.block or hidden % d_model or self.d_out != d_model):
            raise ConfigError(
                f"ShuffleConfig: faithful=True needs widths that divide; got block={config.block}, d_model={d_model}, "
                f"hidden={hidden}, d_out={self.d_out}"
            )
        check_choice("ShuffleConfig", "activation", activation, tuple(ACTIVATIONS))
        self.activation = "gelu" if config.faithful else activation
        self.groups = math.ceil(d_model / config.block)
        self.hidden = self.groups * math.ceil(hidden / self.groups)
        self.norm = nn.LayerNorm(d_model, eps=config.norm_eps) if config.norm and not config.faithful else None
        self.up = nn.Parameter(torch.empty(self.groups, self.hidden // self.groups, config.block))
        self.up_bias = nn.Parameter(torch.zeros(self.hidden))
        out = math.ceil(self.d_out / self.groups)
        self.down = nn.Parameter(torch.empty(self.groups, out, self.hidden // self.groups))
        self.bias = nn.Parameter(torch.zeros(self.d_out))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights of unit gain, or as published."""
        for weight in (self.up, self.down):
            nn.init.normal_(weight, std=0.02 if self.config.faithful else weight.shape[-1] ** -0.5)
        for bias in (self.up_bias, self.bias):
            nn.init.normal_(bias, std=0.001 if self.config.faithful else 0.0)

    def hidden_activations(self, x_ND: Tensor) -> Tensor:
        """Return what the second matrices multiply, [N, F], in shuffled order."""
        v_ND = x_ND if self.norm is None else self.norm(x_ND)
        u_NF = block_product(pad(v_ND, self.up), self.up)
        return ACTIVATIONS[self.activation](shuffle(u_NF, self.groups) + self.up_bias)

    def tokens(self, x_ND: Tensor) -> Tensor:
        return each_alone(self._finite, x_ND)

    def _finite(self, x_ND: Tensor) -> Tensor:
        y = block_product(self.hidden_activations(x_ND), self.down)
        return y[:, : self.d_out] + self.bias

    def cost(self, n_tokens: int = 1) -> Cost:
        stored = sum(p.numel() for p in self.parameters())
        matrices = self.up.numel() + self.down.numel()
        return Cost(2.0 * matrices * n_tokens, float(stored * self.up.element_size() if n_tokens else 0), stored)

    def output_parameters(self) -> list[nn.Parameter]:
        return [self.down, self.bias]

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Put each dense neuron into the group whose inputs it weighs most, and solve for the second matrices.

        The second matrices are the least-squares answer to the dense layer's outputs, group by group, with a small
        ridge; a gated layer gives the directions of its gates.
        """
        with torch.no_grad():
            self._take_neurons(dense.up if dense.gate is None else dense.gate)
            hidden_NnH = self.hidden_activations(x_ND).double().unflatten(1, (self.groups, -1))
            target_ND = dense.tokens(x_ND).double()
            out = self.down.shape[1]
            for group in range(self.groups):
                part = slice(group * out, min((group + 1) * out, self.d_out))
                if part.start >= self.d_out:
                    break
                features = hidden_NnH[:, group]
                mean, goal_mean = features.mean(0), target_ND[:, part].mean(0)
                centred = features - mean
                gram = centred.T @ centred
                gram.diagonal().add_(1e-3 * gram.diagonal().mean() + 1e-12)
                weight = torch.linalg.solve(gram, centred.T @ (target_ND[:, part] - goal_mean))
                self.down[group, : weight.shape[1]].copy_(weight.T)
                self.bias[part].copy_(goal_mean - mean @ weight)
        self.fitted = "closed-form"
        return self.fitted

    def _take_neurons(self, linear: nn.Linear) -> None:
        """Copy rows of a dense first matrix into groups, the longest first, each where it fits best with room left."""
        groups, room, block = self.up.shape
        pieces_FnB = F.pad(linear.weight, (0, groups * block - self.d_model)).unflatten(1, (groups, block))
        size_Fn = pieces_FnB.norm(dim=2)
        filled = [0] * groups
        for neuron in size_Fn.norm(dim=1).argsort(descending=True, stable=True).tolist()[: self.hidden]:
            order = size_Fn[neuron].argsort(descending=True, stable=True).tolist()
            group = next(g for g in order if filled[g] < room)
            place = filled[group]
            self.up[group, place].copy_(pieces_FnB[neuron, group])
            self.up_bias[place * groups + group] = linear.bias[neuron] if linear.bias is not None else 0.0
            filled[group] += 1


def pad(v_ND: Tensor, up_nHB: Tensor) -> Tensor:
    """Fill the last group's missing inputs with zeros."""
    missing = up_nHB.shape[0] * up_nHB.shape[2] - v_ND.shape[1]
    return F.pad(v_ND, (0, missing)) if missing else v_ND


def shuffle(u_NF: Tensor, groups: int) -> Tensor:
    """Deal the channels of n contiguous groups round: place j of group g goes to place j n + g."""
    return u_NF.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1)
