"""TreeFFN: walk the token down binary trees of neurons; only the neurons on its way are computed.

Legend: N tokens, D width, K trees, L = depth + 1 levels, M = 2^L - 1 nodes per tree in heap order, P = K L visited.
Reading order: `TreeFFN.tokens`, `reset_parameters`, `cost`; what helps training is in `routing.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS, taken_over
from nogemm.config import layer_of
from nogemm.cost import Cost, distinct_rows
from nogemm.layers._auxiliary import attach_loss
from nogemm.layers._base import FFN, Route
from nogemm.layers._scale import OUTPUT_STD, firing_energy
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.tree.config import TreeConfig
from nogemm.layers.tree.fit import fit_tree
from nogemm.layers.tree.routing import PathStatistics, balance_loss, path_statistics, step_weights
from nogemm.ops import neuron_sum, tree_descend
from nogemm.ops._packing import quantise_rows
from nogemm.shape import FFNShape


@layer_of(TreeConfig)
class TreeFFN(FFN):
    """Replace a dense FFN by neurons on one path through each of K binary trees.

        i_0 = 0;   z_t = <weight_in[k, i_t], x> + bias_in[k, i_t];   i_{t+1} = 2 i_t + 1 + [z_t > threshold[k, i_t]]
        y = bias + sum_k sum_t act(z_t) weight_out[k, i_t] + core(x)

    | parameter | shape | trainable |
    |---|---|---|
    | weight_in, bias_in | [K, M, D], [K, M] | yes |
    | weight_out | [K, M, d_out] | yes |
    | threshold | [K, M] | if branch="bias"; a buffer if balance="bias" moves it |
    | core_in, core_in_bias, core_out | [w, D], [w], [w, d_out] | yes |
    | bias | [d_out] | yes |

    Training computes what evaluation computes: the visited neurons, forward and backward. Wins wherever weights are
    dear to read: one token touches K (D + 1) rows of each matrix. Loses quality against a dense layer of the same
    number of active neurons; memory is that of all nodes.

    Source: UltraFastBERT (Belcak and Wattenhofer, 2023). Differs in the options, which are off by default, in the
    output bias and in the initialisation (`init="reference"` is the published one).
    """

    def __init__(self, config: TreeConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: TreeConfig = config
        self.activation = config.activation or taken_over(shape.activation)
        d_model = self.d_model
        self.levels = config.depth + 1
        nodes = 2**self.levels - 1
        stored = (config.trees, nodes)
        self.weight_in = nn.Parameter(torch.empty(*stored, d_model))
        self.bias_in = nn.Parameter(torch.empty(stored)) if config.bias else None
        self.weight_out = nn.Parameter(torch.empty(*stored, self.d_out))
        self.threshold: Tensor | None
        if config.branch == "bias" and config.balance != "bias":
            self.threshold = nn.Parameter(torch.empty(stored))
        else:
            self.register_buffer("threshold", torch.empty(stored) if config.branch == "bias" else None)
        self.core_in = nn.Parameter(torch.empty(config.core, d_model)) if config.core else None
        self.core_in_bias = nn.Parameter(torch.empty(config.core)) if config.core and config.bias else None
        self.core_out = nn.Parameter(torch.empty(config.core, self.d_out)) if config.core else None
        self.bias = nn.Parameter(torch.empty(self.d_out)) if config.out_bias else None
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64) if config.routing == "anneal" else None)
        if not self.weight_in.is_meta:  # there, weights will be loaded: their scale would be computed for nothing
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights as `config.init` says; biases and thresholds start at zero."""
        active = self.config.trees * self.levels + self.config.core
        reference = self.config.init == "reference"
        into = 0.02 if reference else 1 / math.sqrt(self.d_model)
        out = 0.02 if reference else OUTPUT_STD / math.sqrt(active * firing_energy(self.activation))
        for weight, std in (
            (self.weight_in, into),
            (self.core_in, into),
            (self.weight_out, out),
            (self.core_out, out),
        ):
            if weight is not None:
                nn.init.normal_(weight, std=std)
        for zero in (self.bias_in, self.threshold, self.core_in_bias, self.bias):
            if zero is not None:
                nn.init.zeros_(zero)

    in_turn = True

    def routes(self, x_ND: Tensor) -> Route:
        z_NKL, nodes_NKL = self.paths(x_ND)
        return Route(nodes_NKL.flatten(1), ACTIVATIONS[self.activation](z_NKL).flatten(1))

    def decisions(self, x_ND: Tensor) -> Tensor:
        z_NKL, nodes_NKL = self.paths(x_ND)
        bar = 0.0 if self.threshold is None else self.threshold.flatten()[nodes_NKL.long()]
        return (z_NKL - bar)[..., :-1]  # a leaf decides nothing

    def decided(self, rows_NP: Tensor) -> Tensor:
        nodes_NKL = rows_NP.unflatten(1, (self.config.trees, self.levels)) % self.weight_in.shape[1]
        return nodes_NKL[..., 1:] % 2 == 0  # heap order: right children have even numbers

    def paths(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return z at the visited nodes, [N, K, L], and their numbers k M + i, int32 [N, K, L]."""
        return tree_descend(x_ND, self.weight_in, self.bias_in, self.threshold, self.row_sparse)

    def tokens(self, x_ND: Tensor) -> Tensor:
        z_NKL, nodes_NKL = self.paths(x_ND)
        # Zero, or NaN for a token that is not finite: the root sees all of it, an activation may hide it.
        poison_NK1 = z_NKL[..., :1].detach() * 0.0
        fire_NKL = ACTIVATIONS[self.activation](z_NKL) + poison_NK1
        if self.training:
            fire_NKL = self._train_routing(z_NKL, nodes_NKL, fire_NKL)
        y_ND = neuron_sum(fire_NKL.flatten(1), nodes_NKL.flatten(1), self.weight_out, self.row_sparse)
        if self.core_in is not None and self.core_out is not None:
            z_NW = nn.functional.linear(x_ND, self.core_in, self.core_in_bias)
            y_ND = torch.addmm(y_ND, ACTIVATIONS[self.activation](z_NW), self.core_out)
        return y_ND if self.bias is None else y_ND + self.bias

    def _train_routing(self, z_NKL: Tensor, nodes_NKL: Tensor, fire_NKL: Tensor) -> Tensor:
        """Weigh the steps and balance the halves, as the config asks; values change only under "anneal"."""
        config = self.config
        if self.levels == 1 or (config.routing == "hard" and config.balance == "none"):
            return fire_NKL
        index_NKL = nodes_NKL.long()
        margin_NKL = z_NKL if self.threshold is None else z_NKL - self.threshold.flatten()[index_NKL]
        if config.routing != "hard":
            fire_NKL = fire_NKL * step_weights(margin_NKL, config.temperature, self._hardness())
        if config.balance == "loss" and torch.is_grad_enabled():
            loss = balance_loss(margin_NKL, index_NKL, self.weight_in.shape[:2].numel(), config.temperature)
            fire_NKL = attach_loss(fire_NKL, config.balance_rate * loss)
        elif config.balance == "bias" and self.threshold is not None:
            self._move_thresholds(margin_NKL.detach(), index_NKL)
        return fire_NKL

    def _hardness(self) -> float | None:
        """Return how hard steps are by now, from 0 to 1; None: straight-through. Counts a training step."""
        if self.config.routing != "anneal":
            return None
        steps = self.get_buffer("steps")
        hardness = min(int(steps) / self.config.anneal_steps, 1.0)
        steps += 1
        return hardness

    def _move_thresholds(self, margin_NKL: Tensor, index_NKL: Tensor) -> None:
        """Raise the threshold of a node that sends more to the right, lower that of one that sends more to the left."""
        assert self.threshold is not None
        with torch.no_grad():
            flat = self.threshold.view(-1)
            inner = index_NKL[..., :-1].flatten()
            excess = torch.zeros_like(flat).index_add_(0, inner, torch.sign(margin_NKL[..., :-1]).flatten().to(flat))
            visits = torch.zeros_like(flat).index_add_(0, inner, torch.ones_like(inner, dtype=flat.dtype))
            flat += self.config.balance_rate * excess / visits.clamp_min(1.0)

    @torch.no_grad()
    def path_statistics(self, x: Tensor) -> PathStatistics:
        """Follow tokens x [..., D] down the trees: dead nodes, share of left turns, balance of the leaves."""
        x_ND = x.reshape(-1, self.d_model).to(self.compute_dtype())
        z_NKL, nodes_NKL = self.paths(x_ND)
        fire_NKL = ACTIVATIONS[self.activation](z_NKL)
        return path_statistics(nodes_NKL, fire_NKL, self.weight_in.shape[1])

    def cost(self, n_tokens: int = 1) -> Cost:
        config = self.config
        itemsize = self.weight_in.element_size()
        stored = sum(
            p.numel() for p in (self.weight_in, self.bias_in, self.threshold, self.weight_out) if p is not None
        )
        per_node = stored / (config.trees * (2**self.levels - 1))
        always = [self.core_in, self.core_in_bias, self.core_out, self.bias]
        shared = sum(p.numel() for p in always if p is not None)
        visited = config.trees * sum(distinct_rows(n_tokens, 2**level) for level in range(self.levels))
        active = config.trees * self.levels + config.core
        return Cost(
            2.0 * active * (self.d_model + self.d_out) * n_tokens,
            itemsize * (visited * per_node + (shared if n_tokens else 0)),
            stored + shared,
        )

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Split the tokens into balanced halves level by level, then solve for the out-rows (see `fit_tree`)."""
        fit_tree(self, dense, x_ND)
        self.fitted = "closed-form"
        return self.fitted

    def output_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.weight_out, self.core_out, self.bias) if p is not None]

    def table_parameters(self) -> list[nn.Parameter]:
        """Return the out-rows, an optimiser group of their own."""
        return [self.weight_out]

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return the in-rows, an optimiser group of their own."""
        return [self.weight_in]

    def row_parameters(self) -> list[nn.Parameter]:
        return [self.weight_in, self.weight_out]

    def active_neurons(self) -> int:
        return self.config.trees * self.levels + self.config.core

    def packed_share(self, dtype: str) -> float:
        return {"fp32": 1.0, "bf16": 0.5, "int8": 0.375}[dtype]  # in-rows stay in 16 bits when out-rows go to 8

    def row_bytes(self, n_tokens: int) -> float:
        return float(n_tokens) * 4 * self.config.trees * self.levels * (self.d_model + self.d_out)

    @torch.no_grad()
    def rounded(self, dtype: str) -> TreeFFN:
        """Return a float32 copy whose weights are rounded as `pack(dtype)` rounds them."""
        twin = TreeFFN(self.config, self.shape)
        twin.load_state_dict(self.state_dict())
        for weight in (twin.weight_in, twin.core_in):
            if weight is not None and dtype != "fp32":
                weight.copy_(weight.bfloat16())  # in-rows stay bfloat16 in int8, because they decide the path
        for weight in (twin.weight_out, twin.core_out):
            if weight is not None and dtype == "int8":
                rows, scale = quantise_rows(weight, "int8")
                assert scale is not None
                weight.copy_(rows.float() * scale.unsqueeze(-1))
            elif weight is not None and dtype == "bf16":
                weight.copy_(weight.bfloat16())
        return twin.eval().requires_grad_(False)
