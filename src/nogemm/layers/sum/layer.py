"""A sum of layers: every term answers the same tokens, and the answers are added.

Legend: N tokens, D width.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nogemm.config import layer_of
from nogemm.cost import Cost
from nogemm.errors import ConfigError
from nogemm.layers._base import FFN, Route
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.sum.config import SumConfig
from nogemm.shape import FFNShape

NO_ROWS = "a sum reads no rows of its own; route each of its terms"


@layer_of(SumConfig)
class SumFFN(FFN):
    """Add up what two or more layers answer.

        y = sum over terms i of f_i(x)

    | parameter | shape |
    |---|---|
    | terms.i. ... | as the term's own layer has them |

    Starts: the first term from the dense FFN, as its kind does. Each later term is fitted to what the terms before it
    leave of the dense FFN's answers, where texts are given and its answer is linear in something (`FFN.solve`);
    elsewhere it answers zero at first. So the sum starts no worse than its first term.

    Cost: the terms' costs added up. The additions of the answers, d_out a token and term, are not counted.

    Wins where one method's strength is another's weakness: few neurons for what all tokens share, rows for the rest.
    Loses where one term does nearly all of the work: every term costs a call.
    """

    def __init__(self, config: SumConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: SumConfig = config
        self.terms = nn.ModuleList(term.make(shape) for term in config.terms)
        self.in_turn = any(term.in_turn for term in self.layers)
        self.dynamic_int8 = any(term.dynamic_int8 for term in self.layers)
        self.has_cutoff = self.layers[0].has_cutoff
        self.chunk = math.lcm(*(term.chunk for term in self.layers))

    @property
    def layers(self) -> list[FFN]:
        """The terms."""
        return [term for term in self.terms if isinstance(term, FFN)]

    def tokens(self, x_ND: Tensor) -> Tensor:
        return self._answer(x_ND, len(self.terms))

    def _answer(self, x_ND: Tensor, count: int) -> Tensor:
        """Add up the first `count` terms' answers."""
        y_ND = self.terms[0](x_ND)
        for term in self.terms[1:count]:
            y_ND = y_ND + term(x_ND)
        return y_ND

    def compute_dtype(self) -> torch.dtype:
        return self.layers[0].compute_dtype()

    def routes(self, x_ND: Tensor) -> Route:
        raise ConfigError(NO_ROWS)

    def cost(self, n_tokens: int = 1) -> Cost:
        return sum((term.cost(n_tokens) for term in self.layers), Cost(0.0, 0.0, 0))

    def row_bytes(self, n_tokens: int) -> float:
        return sum(term.row_bytes(n_tokens) for term in self.layers)

    def table_parameters(self) -> list[nn.Parameter]:
        """Return the tables of all terms, an optimiser group of their own."""
        return [parameter for term in self.layers for parameter in term.table_parameters()]

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return the projections of all terms, an optimiser group of their own."""
        return [parameter for term in self.layers for parameter in term.projection_parameters()]

    def output_parameters(self) -> list[nn.Parameter]:
        return [parameter for term in self.layers for parameter in term.output_parameters()]

    @property
    def row_sparse(self) -> bool:  # type: ignore[override]
        """Whether any term's gradients hold the visited rows alone; setting it sets it for all of them."""
        return any(term.row_sparse for term in self.layers)

    @row_sparse.setter
    def row_sparse(self, wanted: bool) -> None:
        for term in self.layers:
            term.row_sparse = wanted

    # -- start

    def fit_dense(self, dense: DenseFFN) -> str:
        """Start the first term as its kind does; the others answer zero."""
        self.fitted = self.layers[0].fit_dense(dense)
        for term in self.layers[1:]:
            term.start_at_zero()
        return self.fitted

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Start the first term on activations x; fit each later one to what the sum still leaves there."""
        self.fitted = self.layers[0].fit_activations(dense, x_ND)
        with torch.no_grad():
            wanted_ND = dense.tokens(x_ND)
            for place, term in enumerate(self.layers):
                if place:
                    term.fit_rest(x_ND, wanted_ND - self._answer(x_ND, place))
        later = [parameter for term in self.layers[1:] for parameter in term.output_parameters()]
        if self.fitted == "random" and any(parameter.any() for parameter in later):
            self.fitted = "closed-form"
        return self.fitted

    def fit_own_weights(self) -> None:
        for term in self.layers:
            term.fit_own_weights()

    def start_from_mean(self, mean_D: Tensor) -> None:
        """Let the first term answer the mean, if it can; the others answer zero."""
        self.layers[0].start_from_mean(mean_D)
        for term in self.layers[1:]:
            term.start_at_zero()

    def solve(self, x_ND: Tensor, y_ND: Tensor) -> float | None:
        """Solve for one term after the other, each given what all others answer; return 1 - R^2 of the sum."""
        with torch.no_grad():
            solved = []
            for term in self.layers:
                others_ND = self.tokens(x_ND) - term(x_ND)
                solved.append(term.solve(x_ND, y_ND - others_ND))
            if all(share is None for share in solved):
                return None
            left = (y_ND - self.tokens(x_ND)).square().sum()
            return float(left / (y_ND - y_ND.mean(0)).square().sum().clamp_min(1e-30))

    # -- storage and precision

    @property
    def storage(self) -> str | None:  # type: ignore[override]
        """How the terms' tables are stored, "mixed" where they differ; None if no term has any."""
        found = {term.storage for term in self.layers} - {None}
        return next(iter(found), None) if len(found) < 2 else "mixed"

    def compress(self, tables: str = "int8") -> SumFFN:
        """Store the tables of every term that has some in fewer bytes, in place; see `LookupFFN.compress`."""
        return self._each_with_tables(lambda term: term.compress(tables), "compress")

    def decompress(self) -> SumFFN:
        """Turn the terms' compressed tables back into trainable parameters, in place."""
        return self._each_with_tables(lambda term: term.decompress(), "decompress")

    def _each_with_tables(self, change: Callable[[FFN], FFN], action: str) -> SumFFN:
        if self.storage is None:
            raise ConfigError(f"{action}: no term of this SumFFN has tables")
        for term in self.layers:
            if term.storage is not None:
                change(term)
        self.config = dataclasses.replace(self.config, terms=tuple(term.config for term in self.layers))
        return self

    def rounded(self, dtype: str) -> SumFFN:
        twin = copy.deepcopy(self)
        twin.terms = nn.ModuleList(term.rounded(dtype) for term in self.layers)
        return twin

    def packed_share(self, dtype: str) -> float:
        twins = [term.rounded(dtype) for term in self.layers]
        sizes = [sum(t.numel() * t.element_size() for t in (*twin.parameters(), *twin.buffers())) for twin in twins]
        packed = [size * term.packed_share(dtype) for size, term in zip(sizes, self.layers, strict=True)]
        return sum(packed) / max(1, sum(sizes))

    def computes_in(self, dtype: str) -> str:
        return max(self.layers, key=lambda term: term.cost(1).flops).computes_in(dtype)
