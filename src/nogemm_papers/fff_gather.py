"""The comparison behind FFF's published "40x": the gather form of a tree in plain batched PyTorch, and what it is held
against, a dense layer as a batch of products with one matrix per token.

Both are slow ways to write their layer on purpose: they show what the ratio was between.

Legend: N tokens, D width, F neurons, L levels, C copies of the layer.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.bench.contenders.layer import DenseStack, LayerContender
from nogemm.bench.engine.check import DENSE_BOUNDS, compare, some_rows
from nogemm.bench.engine.measure import Spec
from nogemm.bench.engine.rounding import TREE_BOUND
from nogemm.layers import TreeConfig, TreeFFN

GATHER, BMM = "fff-torch-gather", "dense-torch-bmm"
FACTORY = "nogemm_papers.fff_gather:FFFContender"


def published_forms(shape: dict[str, Any]) -> list[Spec]:
    """Return both forms as contenders of `bench methods`, for layers of that shape."""
    return [Spec(name=form, factory=FACTORY, settings=shape | {"form": form}) for form in (GATHER, BMM)]


class GatherTree(nn.Module):
    """One tree, level by level: each token's rows are gathered, and multiplied as a batch of vectors."""

    def __init__(self, layer: TreeFFN) -> None:
        super().__init__()
        self.layer = layer
        self.act = ACTIVATIONS[layer.activation]

    def forward(self, x_ND: Tensor) -> Tensor:
        layer = self.layer
        node_N = torch.zeros(len(x_ND), dtype=torch.int64)
        y_ND = x_ND.new_zeros(len(x_ND), layer.d_out)
        for _ in range(layer.levels):
            z_N = torch.bmm(x_ND.unsqueeze(1), layer.weight_in[0, node_N].unsqueeze(2)).flatten()
            if layer.bias_in is not None:
                z_N = z_N + layer.bias_in[0, node_N]
            y_ND = y_ND + self.act(z_N).unsqueeze(1) * layer.weight_out[0, node_N]
            node_N = 2 * node_N + 1 + (z_N > 0).long()
        return y_ND if layer.bias is None else y_ND + layer.bias


class BatchedDense(nn.Module):
    """A dense layer whose matrices are expanded over the batch, so that every token is multiplied on its own."""

    def __init__(self, stack: DenseStack) -> None:
        super().__init__()
        self.up, self.down, self.act = stack.up[0], stack.down[0], stack.activation

    def forward(self, x_ND: Tensor) -> Tensor:
        h_NF = self.act(self._product(self.up, x_ND))
        return self._product(self.down, h_NF)

    @staticmethod
    def _product(linear: nn.Module, x_ND: Tensor) -> Tensor:
        weight, bias = linear.get_parameter("weight"), linear.get_parameter("bias")
        return torch.bmm(weight.expand(len(x_ND), -1, -1), x_ND.unsqueeze(2)).squeeze(2) + bias


def tree_of(hidden: int) -> TreeConfig:
    """Describe the one tree that has at most `hidden` neurons."""
    return TreeConfig(trees=1, depth=max((hidden + 1).bit_length() - 2, 0))


class FFFContender(LayerContender):
    """One of the two forms, verified against float64 (see `nogemm.bench.engine.worker.Contender`)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.modules: list[nn.Module] = []
        self.reference: nn.Module = nn.Identity()

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        s = self.settings
        self._open(case, torch.float32)
        torch.manual_seed(s["seed"])
        if s["form"] == GATHER:
            config = tree_of(s["hidden"])
            trees = [config.build(s["d"], activation=s["activation"]).eval() for _ in range(self.copies)]
            self.modules = [GatherTree(tree) for tree in trees]
            self.reference = copy.deepcopy(trees[0]).double()
        else:
            stacks = [DenseStack(s["d"], s["hidden"], s["activation"], 1, s["seed"] + c) for c in range(self.copies)]
            self.modules = [BatchedDense(stack) for stack in stacks]
            self.reference = copy.deepcopy(stacks[0]).double()
        published = {"published_against": BMM} if s["form"] == GATHER else {}
        return {"layers": self.copies} | published | self.verify()

    def verify(self) -> dict[str, Any]:
        """Compare the first copy with float64."""
        bound = TREE_BOUND if self.settings["form"] == GATHER else DENSE_BOUNDS["fp32"]
        assert self.pool is not None
        x_ND = self.pool.draw(max(self.batch, 64))[some_rows(max(self.batch, 64))]
        with torch.inference_mode():
            exact = self.reference(x_ND.double())
            return compare(self.modules[0](x_ND), exact[0] if isinstance(exact, tuple) else exact, bound)

    def run(self, inputs: Any) -> Any:
        with torch.inference_mode():
            return [module(x) for module, x in zip(self.modules, inputs, strict=True)]
