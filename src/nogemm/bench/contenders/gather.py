"""torch's embedding_bag as a peer of the gather alone: a LookupFFN's rows summed with its scores, codes given.

Legend: N tokens, D width, T tables, R rows of a table.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F

from nogemm.bench.contenders.layer import LayerContender, our_layer
from nogemm.bench.engine.check import compare, some_rows
from nogemm.bench.engine.rounding import our_bound

EMBEDDING_BAG = "embedding-bag-fp32"


class EmbeddingBagContender(LayerContender):
    """The second half of an fp32 LookupFFN by `embedding_bag`, held against the whole layer in float64.

    Hashing happens outside the clock, so its time is to be read beside a whole layer's as a part of it.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.layer = our_layer(settings)
        self.tables: list[torch.Tensor] = []

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self._open(case, torch.float32)
        (tables_TRD,) = self.layer.table_parameters()
        rows = tables_TRD.flatten(0, 1)
        if len(self.tables) != self.copies:
            self.tables = []
            self.tables = [rows.clone() for _ in range(self.copies)]
        assert self.pool is not None
        tokens = self.pool.draw(max(self.batch, 64))
        checked = tokens[some_rows(len(tokens))]
        with torch.inference_mode():
            index, scores = self._lookups(checked)
            y_ND = self._sum(self.tables[0], index, scores)
            bias_D = dict(self.layer.named_parameters()).get("bias")
            y_ND = y_ND if bias_D is None else y_ND + bias_D
            exact = copy.deepcopy(self.layer).double()(checked.double())
        read = index.shape[1] * self.layer.d_out
        facts = {"layers": self.copies, "flops": 2.0 * read * self.batch, "row_bytes": 4.0 * read * self.batch}
        facts |= {"weight_bytes": 4.0 * rows.numel() * self.copies, "token_bytes": 0, "computes_in": "fp32"}
        facts["bytes_read"] = min(4.0 * rows.numel(), facts["row_bytes"])
        return facts | compare(y_ND, exact, our_bound("fp32", torch.zeros(1)))

    def _lookups(self, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        route = self.layer.route(x_ND)
        assert route.weights is not None
        return route.rows.long(), route.weights

    @staticmethod
    def _sum(rows: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(index, rows, per_sample_weights=scores, mode="sum")

    def _prepare(self, tokens: tuple[torch.Tensor, ...]) -> Any:
        with torch.inference_mode():
            return [self._lookups(x) for x in tokens]

    def run(self, inputs: Any) -> Any:
        with torch.inference_mode():
            return [self._sum(rows, *lookups) for rows, lookups in zip(self.tables, inputs, strict=True)]
