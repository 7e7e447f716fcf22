"""LeafTreeFFN packed for evaluation: the descent is one native call, a leaf two small matrix products.

Legend: N tokens, D width, O output width, J leaves, W neurons per leaf.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nogemm.layers._base import PackedFFN
from nogemm.layers.dense import ACTIVATIONS
from nogemm.layers.leaf_tree import by_leaf, poison, reached_leaves
from nogemm.ops._packing import quantise_rows

if TYPE_CHECKING:
    from nogemm.layers.leaf_tree import LeafTreeFFN


class PackedLeafTree(PackedFFN):
    """The evaluation twin of a LeafTreeFFN.

    dtype "fp32": everything float32. "bf16": nodes and leaves bfloat16. "int8": leaves int8 with a scale per neuron,
    nodes bfloat16. Arithmetic is float32 always: a leaf is widened when a token reaches it, once for all its tokens.
    """

    def __init__(self, layer: LeafTreeFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.activation = layer.activation
        node_MD = layer.node.detach().float()
        self._keep("node", node_MD if dtype == "fp32" else node_MD.bfloat16().float())
        for name in ("node_bias", "leaf_in_bias", "leaf_out_bias", "master_in_bias", "master_out_bias", "master_gate"):
            value = getattr(layer, name)
            self._keep(name, None if value is None else value.detach().float().clone())
        for name in ("leaf_in", "leaf_out", "master_in", "master_out"):
            self._keep_rows(name, getattr(layer, name))

    def _keep(self, name: str, value: Tensor | None) -> None:
        self.register_buffer(name, value, persistent=False)

    def _keep_rows(self, name: str, rows: Tensor | None) -> None:
        scale = None
        if rows is not None:
            rows = rows.detach().float().clone()
            if self.dtype != "fp32":
                rows, scale = quantise_rows(rows, self.dtype)
        self._keep(name, rows)
        self._keep(f"{name}_scale", scale)

    def _rows(self, name: str, leaf: int | None = None) -> Tensor:
        """Return one leaf's rows in float32."""
        rows, scale = self.get_buffer(name), getattr(self, f"{name}_scale")
        if leaf is not None:
            rows, scale = rows[leaf], None if scale is None else scale[leaf]
        return rows.float() if scale is None else rows.float() * scale.unsqueeze(-1)

    def tokens(self, x_ND: Tensor) -> Tensor:
        x = x_ND.float()
        act = ACTIVATIONS[self.activation]
        y_NO = x.new_empty(x.shape[0], self.d_out)
        in_bias, out_bias = self.get_buffer("leaf_in_bias"), self.get_buffer("leaf_out_bias")
        for leaf, index in by_leaf(reached_leaves(x, self.get_buffer("node"), self.get_buffer("node_bias"))):
            h_nW = act(nn.functional.linear(x[index], self._rows("leaf_in", leaf), in_bias[leaf]))
            y_NO[index] = torch.addmm(out_bias[leaf], h_nW, self._rows("leaf_out", leaf))
        y_NO += poison(x)
        if self.config.master:  # type: ignore[attr-defined]
            h_NW = act(nn.functional.linear(x, self._rows("master_in"), self.get_buffer("master_in_bias")))
            master_NO = h_NW @ self._rows("master_out") + self.get_buffer("master_out_bias")
            y_NO = torch.lerp(master_NO, y_NO, torch.sigmoid(self.get_buffer("master_gate")))
        return y_NO.to(x_ND.dtype)
