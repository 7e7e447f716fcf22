"""LeafTreeFFN packed for evaluation: the descent is one native call, the leaves' neurons another.

Legend: N tokens, D width, O output width, M nodes, J leaves, W neurons per leaf, w of the master leaf, F = J W + w.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.cost import distinct_rows
from nogemm.layers._base import PackedFFN, Route, packed_of
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.leaf_tree.layer import LeafTreeFFN, by_leaf, poison, reached_leaves
from nogemm.layers.neurons.all import dense_from, dense_us, rows_us
from nogemm.layers.neurons.store import NeuronStore

# Measured as processor time: a token's byte of the mask for every neuron, made and walked through; and the calls of
# torch for every leaf that has tokens, which make sorting slower than reading rows until leaves have many.
_MASK_US = 2e-3
_LEAF_US = 30.0


@packed_of(LeafTreeFFN)
class PackedLeafTree(PackedFFN):
    """The evaluation twin of a LeafTreeFFN: the neurons of all leaves side by side in a `NeuronStore`.

    dtype "fp32": everything float32. "bf16": nodes and neurons bfloat16. "int8": neurons int8 with a scale per row,
    nodes bfloat16. Arithmetic is float32 always. The master leaf's neurons lie behind the others, and its gate is
    multiplied into what both give.

    Of few tokens each reads its own leaf's rows, all in one call; more are sorted by leaf, whose tokens then share a
    product. How many are few says the machine (`nogemm.hardware.speeds`).
    """

    def __init__(self, layer: LeafTreeFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        node_MD = layer.node.detach().float()
        self._keep("node", node_MD if dtype == "fp32" else node_MD.bfloat16().float())
        self._keep("node_bias", layer.node_bias.detach().float().clone())
        self.leaves, self.width = layer.leaf_in_bias.shape
        up_FD, bias_F, down_FO, biases_JO = (part.detach().float() for part in _joined(layer))
        self._keep("biases", biases_JO.clone())
        dense = DenseFFN.from_weights(up_FD, bias_F, down_FO.T, None, activation=layer.activation)
        self.neurons = NeuronStore([dense], dtype)
        self.native = self.neurons.native
        self.total = len(bias_F)

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def fix_path(self, path: str) -> None:
        super().fix_path(path)
        numbers, shared = self.neurons.numbers, self.total - self.leaves * self.width

        def named_us(n: int) -> float:
            return rows_us(self.dtype, n, n * (self.width + shared) * numbers) + n * self.total * _MASK_US

        def sorted_us(n: int) -> float:
            hit = distinct_rows(n, self.leaves)
            each = dense_us(self.dtype, max(1, round(n / hit)), self.width * numbers)
            return hit * (each + _LEAF_US) + (dense_us(self.dtype, n, shared * numbers) if shared else 0.0)

        self.sorted_from = dense_from(path, named_us, sorted_us)

    def routes(self, x_ND: Tensor) -> Route:
        leaf_N1 = reached_leaves(x_ND.float(), self.get_buffer("node"), self.get_buffer("node_bias")).unsqueeze(1)
        return Route(leaf_N1, torch.ones_like(leaf_N1, dtype=torch.float32))

    def tokens(self, x_ND: Tensor) -> Tensor:
        x = x_ND.float()
        leaf_N = reached_leaves(x, self.get_buffer("node"), self.get_buffer("node_bias"))
        answer = self._named if self.neurons.native and len(x) < self.sorted_from else self._sorted
        return (answer(x, leaf_N) + self.get_buffer("biases")[leaf_N]).to(x_ND.dtype)

    def _named(self, x_ND: Tensor, leaf_N: Tensor) -> Tensor:
        mask_NF = torch.ones(len(x_ND), self.total, dtype=torch.bool)
        of_leaves = leaf_N.unsqueeze(1) == torch.arange(self.leaves)
        mask_NF[:, : self.leaves * self.width] = of_leaves.repeat_interleave(self.width, 1)
        return self.neurons.named(x_ND, mask_NF)

    def _sorted(self, x_ND: Tensor, leaf_N: Tensor) -> Tensor:
        y_NO = x_ND.new_empty(len(x_ND), self.d_out)
        for leaf, index in by_leaf(leaf_N):
            y_NO[index] = self.neurons.part(x_ND[index], slice(leaf * self.width, (leaf + 1) * self.width))
        if self.total > self.leaves * self.width:
            y_NO += self.neurons.part(x_ND, slice(self.leaves * self.width, self.total))
        return y_NO + poison(x_ND)


def _joined(layer: LeafTreeFFN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return in-rows [F, D] and their biases [F], out-rows [F, O], and the output bias of each leaf [J, O]."""
    into, into_bias, out = layer.leaf_in.flatten(0, 1), layer.leaf_in_bias.flatten(), layer.leaf_out.flatten(0, 1)
    biases_JO = layer.leaf_out_bias
    if layer.master_in is None or layer.master_gate is None:
        return into, into_bias, out, biases_JO
    assert layer.master_in_bias is not None
    assert layer.master_out is not None
    assert layer.master_out_bias is not None
    share = torch.sigmoid(layer.master_gate)
    return (
        torch.cat([into, layer.master_in]),
        torch.cat([into_bias, layer.master_in_bias]),
        torch.cat([out * share, layer.master_out * (1.0 - share)]),
        torch.lerp(layer.master_out_bias, biases_JO, share),
    )
