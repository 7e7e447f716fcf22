"""A Switch layer packed for evaluation: the experts' neurons in one store, read by rows or expert by expert.

Legend: N tokens, D width, E experts.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from nogemm.cost import distinct_rows
from nogemm.layers._base import PackedFFN, Route, packed_of
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.neurons.all import dense_from, dense_us, rows_us
from nogemm.layers.neurons.store import NeuronStore
from nogemm.layers.switch.layer import SwitchFFN
from nogemm.layers.switch.routing import Routing, choose_experts, dispatch


@packed_of(SwitchFFN)
class PackedSwitch(PackedFFN):
    """Router in float32, the experts' neurons side by side in a `NeuronStore`; a `faithful` layer's jitter is left out.

    Of few tokens each reads its own expert's rows; more are sorted by expert, whose tokens then share a product. How
    many are few says the machine (`nogemm.hardware.speeds`).
    """

    def __init__(self, layer: SwitchFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.capacity = layer.config.evaluation_capacity
        self.faithful = layer.config.faithful
        self.norm = None
        if layer.norm is not None:
            self.norm = nn.RMSNorm(layer.d_model, eps=1e-6)
            self.norm.load_state_dict(layer.norm.state_dict())
        self.router = copy.deepcopy(layer.router).float()
        experts = [expert for expert in layer.experts if isinstance(expert, DenseFFN)]
        self.hidden = layer.hidden
        self.neurons = NeuronStore(experts, dtype)
        self.native = self.neurons.native
        none = torch.zeros(self.d_out)
        biases = [none if expert.down.bias is None else expert.down.bias.detach().float() for expert in experts]
        self.register_buffer("biases", torch.stack(biases), persistent=False)
        self.requires_grad_(False)

    def fix_path(self, path: str) -> None:
        super().fix_path(path)
        numbers, experts = self.hidden * self.neurons.numbers, len(self.get_buffer("biases"))

        def sorted_us(n: int) -> float:
            hit = distinct_rows(n, experts)
            return hit * dense_us(self.dtype, max(1, round(n / hit)), numbers)

        self.sorted_from = dense_from(path, lambda n: rows_us(self.dtype, n, n * numbers), sorted_us)

    def routes(self, x_ND: Tensor) -> Route:
        x = x_ND.float()
        return choose_experts(self.router(x if self.norm is None else self.norm(x)), self.capacity).route()

    def tokens(self, x_ND: Tensor) -> Tensor:
        x = x_ND.float()
        v_ND = x if self.norm is None else self.norm(x)
        routing = choose_experts(self.router(v_ND), self.capacity)
        if self.neurons.native and len(v_ND) < self.sorted_from:
            y_ND = self._named(v_ND, routing)
        else:
            y_ND = dispatch(
                [partial(self._expert, e) for e in range(len(self.get_buffer("biases")))], routing, v_ND, self.d_out
            )
        return (x + y_ND if self.faithful else y_ND).to(x_ND.dtype)

    def _named(self, v_ND: Tensor, routing: Routing) -> Tensor:
        biases_ED = self.get_buffer("biases")
        chosen_NE = nn.functional.one_hot(routing.expert_N, len(biases_ED)).bool() & routing.kept_N.unsqueeze(1)
        y_ND = self.neurons.named(v_ND, chosen_NE.repeat_interleave(self.hidden, 1)) + chosen_NE.float() @ biases_ED
        return y_ND * routing.gate_N.unsqueeze(1)

    def _expert(self, expert: int, v_ND: Tensor) -> Tensor:
        neurons = slice(expert * self.hidden, (expert + 1) * self.hidden)
        return self.neurons.part(v_ND, neurons) + self.get_buffer("biases")[expert]
