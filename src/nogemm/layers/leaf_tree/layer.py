"""LeafTreeFFN: a soft binary tree chooses a small MLP, its leaf; in evaluation a token computes one leaf only.

Legend: N tokens, D width, O output width, J = 2^depth leaves, W neurons per leaf, M = J - 1 nodes in heap order.
Reading order: `LeafTreeFFN.mixture`, `LeafTreeFFN.hard`, `cost`.
"""

from __future__ import annotations

import copy
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
from nogemm.layers.leaf_tree.config import LeafTreeConfig
from nogemm.layers.leaf_tree.fit import fit_leaf_tree
from nogemm.ops import tree_descend
from nogemm.ops._packing import rounded_rows
from nogemm.shape import FFNShape

MASTER_START = 0.5  # the master leaf's gate starts at sigmoid(0.5)


_CLAMP = 1e-6


@layer_of(LeafTreeConfig)
class LeafTreeFFN(FFN):
    """Replace a dense FFN by a binary tree whose leaves are small MLPs.

        c_i = sigmoid(<node_i, x> + node_bias_i)                               probability of the right child
        p_j = product over the way to leaf j of c_i (right) or 1 - c_i (left)
        leaf_j(x) = act(x leaf_in_j^T + leaf_in_bias_j) leaf_out_j + leaf_out_bias_j
        y = sum_j p_j leaf_j(x)             in training
        y = leaf_j(x), j at the end of the way that turns right where <node_i, x> + node_bias_i > 0     in evaluation

    With a master leaf, y becomes s y + (1 - s) master(x), s = sigmoid(master_gate).

    | parameter | shape |
    |---|---|
    | node, node_bias | [M, D], [M] |
    | leaf_in, leaf_in_bias | [J, W, D], [J, W] |
    | leaf_out, leaf_out_bias | [J, W, O], [J, O] |
    | master_in, master_in_bias, master_out, master_out_bias, master_gate | [w, D], [w], [w, O], [O], [] |

    Training costs all leaves; evaluation the way and one leaf. The two agree once the decisions are hard, which is
    what `harden` is for. Wins at small batches with few wide leaves; loses where 2^D W neurons are dear to train.

    Source: Fast Feedforward Networks (Belcak and Wattenhofer, 2023); master leaf and balance loss from Enhanced Fast
    Feedforward Networks (Charalampopoulos et al., 2024). Differs: the output bias of a leaf counts in evaluation too,
    ties go left in both modes, depth 0 is legal, and usage is counted along true ways.
    """

    def __init__(self, config: LeafTreeConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: LeafTreeConfig = config
        self.activation = config.activation or taken_over(shape.activation)
        d_model = self.d_model
        leaves, width, master = 2**config.depth, config.leaf_width, config.master
        self.node = nn.Parameter(torch.empty(leaves - 1, d_model))
        self.node_bias = nn.Parameter(torch.empty(leaves - 1))
        self.leaf_in = nn.Parameter(torch.empty(leaves, width, d_model))
        self.leaf_in_bias = nn.Parameter(torch.empty(leaves, width))
        self.leaf_out = nn.Parameter(torch.empty(leaves, width, self.d_out))
        self.leaf_out_bias = nn.Parameter(torch.empty(leaves, self.d_out))
        self.master_in = nn.Parameter(torch.empty(master, d_model)) if master else None
        self.master_in_bias = nn.Parameter(torch.empty(master)) if master else None
        self.master_out = nn.Parameter(torch.empty(master, self.d_out)) if master else None
        self.master_out_bias = nn.Parameter(torch.empty(self.d_out)) if master else None
        self.master_gate = nn.Parameter(torch.empty(())) if master else None
        if not self.leaf_in.is_meta:  # there, weights will be loaded: their scale would be computed for nothing
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights: unit-variance pre-activations, an output scale independent of shape; biases zero."""
        energy = firing_energy(self.activation)
        for into, out in ((self.leaf_in, self.leaf_out), (self.master_in, self.master_out)):
            if into is not None and out is not None:
                nn.init.normal_(into, std=1 / math.sqrt(self.d_model))
                nn.init.normal_(out, std=OUTPUT_STD / math.sqrt(out.shape[-2] * energy))
        nn.init.normal_(self.node, std=1 / math.sqrt(self.d_model))
        for zero in (self.node_bias, self.leaf_in_bias, self.leaf_out_bias, self.master_in_bias, self.master_out_bias):
            if zero is not None:
                nn.init.zeros_(zero)
        if self.master_gate is not None:
            nn.init.constant_(self.master_gate, MASTER_START)

    def tokens(self, x_ND: Tensor) -> Tensor:
        y_NO = self.mixture(x_ND) if self.training else self.hard(x_ND)
        if self.master_in is None or self.master_out is None or self.master_gate is None:
            return y_NO
        h_NW = ACTIVATIONS[self.activation](nn.functional.linear(x_ND, self.master_in, self.master_in_bias))
        assert self.master_out_bias is not None
        master_NO = torch.addmm(self.master_out_bias, h_NW, self.master_out)
        return torch.lerp(master_NO, y_NO, torch.sigmoid(self.master_gate))

    # -- training

    def mixture(self, x_ND: Tensor) -> Tensor:
        """Mix all leaves by their probabilities, as `routing` says, with the losses of the config in the gradient."""
        config = self.config
        c_NM = torch.sigmoid(nn.functional.linear(x_ND, self.node, self.node_bias))
        if config.leak > 0:
            c_NM = torch.where(torch.rand_like(c_NM) < config.leak, 1.0 - c_NM, c_NM)
        soft_NJ = leaf_probabilities(c_NM)
        p_NJ = soft_NJ
        if config.routing != "soft":
            hard_NJ = leaf_probabilities((c_NM > 0.5).to(c_NM.dtype))
            p_NJ = hard_NJ if config.routing == "hard" else hard_NJ + (soft_NJ - soft_NJ.detach())
        h_NJW = ACTIVATIONS[self.activation](
            nn.functional.linear(x_ND, self.leaf_in.flatten(0, 1), self.leaf_in_bias.flatten())
        ).unflatten(1, self.leaf_in_bias.shape)
        y_NO = (h_NJW * p_NJ.unsqueeze(-1)).flatten(1) @ self.leaf_out.flatten(0, 1) + p_NJ @ self.leaf_out_bias
        if torch.is_grad_enabled() and len(self.node):
            if config.harden > 0:
                y_NO = attach_loss(y_NO, config.harden * hardening_loss(c_NM))
            if config.balance > 0:
                y_NO = attach_loss(y_NO, config.balance * leaf_balance_loss(soft_NJ))
        return y_NO

    # -- evaluation

    @torch.no_grad()
    def rounded(self, dtype: str) -> FFN:
        if dtype != "int8":
            return super().rounded(dtype)
        twin = copy.deepcopy(self)
        twin.node.copy_(twin.node.bfloat16())
        for rows in (twin.leaf_in, twin.leaf_out, twin.master_in, twin.master_out):
            if rows is not None:
                rows.copy_(rounded_rows(rows, 8))
        return twin

    def packed_share(self, dtype: str) -> float:
        return 0.25 if dtype == "int8" else 1.0

    def routes(self, x_ND: Tensor) -> Route:
        leaf_N1 = self.leaves(x_ND).unsqueeze(1)
        return Route(leaf_N1, torch.ones_like(leaf_N1, dtype=x_ND.dtype))

    def leaves(self, x_ND: Tensor) -> Tensor:
        """Return the leaf that each token reaches, int64 [N]; NaN goes left."""
        return reached_leaves(x_ND, self.node, self.node_bias)

    def hard(self, x_ND: Tensor) -> Tensor:
        """Compute for each token its own leaf alone, tokens of a leaf together."""
        y_NO = x_ND.new_empty(x_ND.shape[0], self.d_out)
        act = ACTIVATIONS[self.activation]
        for leaf, index in by_leaf(self.leaves(x_ND)):
            h_nW = act(nn.functional.linear(x_ND[index], self.leaf_in[leaf], self.leaf_in_bias[leaf]))
            y_NO = y_NO.index_copy(0, index, torch.addmm(self.leaf_out_bias[leaf], h_nW, self.leaf_out[leaf]))
        return y_NO + poison(x_ND)

    @torch.no_grad()
    def usage(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Count the tokens of x [..., D] that pass each node and reach each leaf: int64 [M] and [J]."""
        leaf_N = self.leaves(x.reshape(-1, self.d_model).to(self.compute_dtype()))
        level = torch.bincount(leaf_N, minlength=len(self.leaf_in))
        reached = level
        nodes: list[Tensor] = []
        while len(level) > 1:
            level = level.view(-1, 2).sum(1)
            nodes.insert(0, level)
        return torch.cat(nodes) if nodes else reached.new_empty(0), reached

    def cost(self, n_tokens: int = 1) -> Cost:
        config = self.config
        itemsize = self.leaf_in.element_size()
        macs = config.depth * self.d_model + (config.leaf_width + config.master) * (self.d_model + self.d_out)
        node_bytes = sum(distinct_rows(n_tokens, 2**level) for level in range(config.depth)) * (self.d_model + 1)
        leaf_size = config.leaf_width * (self.d_model + 1 + self.d_out) + self.d_out
        leaf_bytes = distinct_rows(n_tokens, 2**config.depth) * leaf_size
        parts = (self.master_in, self.master_in_bias, self.master_out, self.master_out_bias, self.master_gate)
        shared = sum(p.numel() for p in parts if p is not None) if n_tokens else 0
        stored = sum(p.numel() for p in self.parameters())
        return Cost(2.0 * macs * n_tokens, itemsize * (node_bytes + leaf_bytes + shared), stored)

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Halve the tokens down the tree, and give each leaf the dense layer's best neurons for its own tokens.

        Where the dense layer is gated or has another activation, a leaf answers its tokens' mean output.
        """
        if len(x_ND):
            fit_leaf_tree(self, dense, x_ND)
            self.fitted = "closed-form"
        return self.fitted

    def output_parameters(self) -> list[nn.Parameter]:
        parts = (self.leaf_out, self.leaf_out_bias, self.master_out, self.master_out_bias)
        return [p for p in parts if p is not None]

    def table_parameters(self) -> list[nn.Parameter]:
        """Return the leaves' out-rows, an optimiser group of their own."""
        return [self.leaf_out, self.leaf_out_bias]

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return the nodes, an optimiser group of their own."""
        return [self.node]


def leaf_probabilities(c_NM: Tensor) -> Tensor:
    """Multiply the decisions along each way: c [N, M] in heap order -> p [N, M + 1], rows summing to 1."""
    p_NJ = torch.ones_like(c_NM[:, :1]) if c_NM.shape[1] else c_NM.new_ones(c_NM.shape[0], 1)
    while p_NJ.shape[1] <= c_NM.shape[1]:
        nodes = p_NJ.shape[1]
        right_NJ = p_NJ * c_NM[:, nodes - 1 : 2 * nodes - 1]
        p_NJ = torch.stack([p_NJ - right_NJ, right_NJ], dim=-1).flatten(1)
    return p_NJ


def hardening_loss(c_NM: Tensor) -> Tensor:
    """Return the mean entropy of all decisions in nats: 0 if all are sure, ln 2 if none is."""
    c = c_NM.clamp(_CLAMP, 1.0 - _CLAMP)
    return -(c * c.log() + (1.0 - c) * (1.0 - c).log()).mean()


def leaf_balance_loss(p_NJ: Tensor) -> Tensor:
    """Return J sum_j f_j P_j: f the share of tokens whose likeliest leaf is j, P_j its mean probability; 1 if even."""
    leaves = p_NJ.shape[1]
    share_J = torch.bincount(p_NJ.argmax(1), minlength=leaves).to(p_NJ.dtype) / max(p_NJ.shape[0], 1)
    return leaves * (share_J * p_NJ.mean(0)).sum()


def reached_leaves(x_ND: Tensor, node_MD: Tensor, node_bias_M: Tensor) -> Tensor:
    """Walk each token down the tree; return the leaf it reaches, int64 [N]."""
    if len(node_MD) == 0:
        return torch.zeros(x_ND.shape[0], dtype=torch.int64, device=x_ND.device)
    with torch.no_grad():
        z_N1L, node_N1L = tree_descend(x_ND, node_MD.unsqueeze(0), node_bias_M.unsqueeze(0))
    last_N, right_N = node_N1L[:, 0, -1].long(), z_N1L[:, 0, -1] > 0
    return 2 * last_N + 1 + right_N - len(node_MD)


def by_leaf(leaf_N: Tensor) -> list[tuple[int, Tensor]]:
    """Group tokens: (leaf, indices of its tokens in order) for every leaf that has any."""
    order_N = torch.argsort(leaf_N, stable=True)
    found, counts = torch.unique_consecutive(leaf_N[order_N], return_counts=True)
    return list(zip(found.tolist(), order_N.split(counts.tolist()), strict=True)) if len(found) else []


def poison(x_ND: Tensor) -> Tensor:
    """Return 0 for a finite token and NaN for any other, [N, 1]: an activation may hide an infinity."""
    return (x_ND.detach() * 0.0).sum(1, keepdim=True)
