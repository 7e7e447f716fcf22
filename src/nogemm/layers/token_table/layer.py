"""A token table: the answer to a token is the row of its id.

Legend: N tokens, D width, V vocabulary, E output width.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import layer_of
from nogemm.cost import Cost, distinct_rows
from nogemm.errors import ConfigError
from nogemm.layers._base import FFN, Route
from nogemm.layers._tokens import each_alone
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.hire.sketch import quantise_neurons
from nogemm.layers.token_table.config import TokenTableConfig
from nogemm.layers.token_table.ids import ids_of, made_up_ids
from nogemm.shape import FFNShape


@layer_of(TokenTableConfig)
class TokenTableFFN(FFN):
    """Answer each token by the row of its id, whatever its hidden state is.

        y = rows[id]

    The id comes from the call of the model that the layer is a part of, see `ids.py`; a token that is not finite
    answers NaN as in every layer.

    | parameter | shape | start |
    |---|---|---|
    | rows | [V, E] | see `TokenTableConfig.start` |

    With `row_sparse` its gradient holds the rows of the batch alone, as `LazyAdam` takes it.

    Cost: no arithmetic; a token reads one row of E numbers. V E parameters.

    Wins beside another layer (`SumConfig`), or where a layer was left out: what a token means wherever it stands needs
    no arithmetic. Loses alone: it knows nothing of the context. And memory: V is large.

    Attributes:
        makes_ids_up: take ids that are made up from the tokens' numbers, for a layer outside a model.
    """

    makes_ids_up = False

    def __init__(self, config: TokenTableConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: TokenTableConfig = config
        if config.vocabulary is None:
            raise ConfigError(
                "TokenTableConfig: vocabulary=None takes the model's, which a layer built by itself does not have; "
                "give a number"
            )
        self.rows = nn.Parameter(torch.zeros(config.vocabulary, self.d_out))

    def token_ids(self, x_ND: Tensor) -> Tensor:
        """Return the ids of tokens, int64 [N]."""
        return made_up_ids(x_ND, len(self.rows)) if self.makes_ids_up else ids_of(x_ND)

    def tokens(self, x_ND: Tensor) -> Tensor:
        try:
            rows_NE = F.embedding(self.token_ids(x_ND), self.rows, sparse=self.row_sparse)
        except IndexError as error:
            raise ConfigError(f"{too_large(len(self.rows))} ({error})") from error
        # x * 0 gives x a gradient of zeros, as from any other layer.
        return each_alone(lambda x: rows_NE + x[:, :1] * 0.0, x_ND)

    def routes(self, x_ND: Tensor) -> Route:
        ids_N1 = self.token_ids(x_ND).unsqueeze(1)
        return Route(ids_N1, torch.ones_like(ids_N1, dtype=x_ND.dtype))

    def cost(self, n_tokens: int = 1) -> Cost:
        row = self.d_out * self.rows.element_size()
        return Cost(0.0, distinct_rows(n_tokens, len(self.rows)) * row, self.rows.numel())

    def row_bytes(self, n_tokens: int) -> float:
        return float(n_tokens) * self.d_out * self.rows.element_size()

    def table_parameters(self) -> list[nn.Parameter]:
        """Return the rows, an optimiser group of their own."""
        return [self.rows]

    def output_parameters(self) -> list[nn.Parameter]:
        return [self.rows]

    # -- start

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Fit the rows to the dense layer's answers on x, if the start is "mean" (see `solve`)."""
        if self.config.start == "mean":
            with torch.no_grad():
                self.solve(x_ND, dense.tokens(x_ND))
            self.fitted = "closed-form"
        return self.fitted

    def fit_rest(self, x_ND: Tensor, y_ND: Tensor) -> None:
        self.start_at_zero()
        if self.config.start == "mean":
            self.solve(x_ND, y_ND)

    @torch.no_grad()
    def solve(self, x_ND: Tensor, y_ND: Tensor) -> float:
        """Set each row to the mean target of its tokens, drawn to the mean of all by `prior` tokens of that.

            rows[v] = (sum of y_n over tokens with id v + prior * mean y) / (their number + prior)

        A row without tokens is the mean. Returns 1 - R^2.
        """
        ids_N, wide_ND = self.token_ids(x_ND), y_ND.double()
        count_V1 = torch.bincount(ids_N, minlength=len(self.rows)).double().unsqueeze(1)
        mean_E = wide_ND.mean(0)
        sums_VE = wide_ND.new_zeros(self.rows.shape).index_add_(0, ids_N, wide_ND)
        fitted_VE = (sums_VE + self.config.prior * mean_E) / (count_V1 + self.config.prior)
        self.rows.copy_(torch.where(count_V1 > 0, fitted_VE, mean_E))
        left = (wide_ND - self.rows[ids_N]).square().sum() / (wide_ND - mean_E).square().sum().clamp_min(1e-30)
        return float(left)

    @torch.no_grad()
    def start_from_mean(self, mean_D: Tensor) -> None:
        self.rows.copy_(mean_D.expand_as(self.rows))

    @torch.no_grad()
    def take_rows(self, ids_N: Tensor, y_ND: Tensor) -> None:
        """Store an answer for each of the ids."""
        self.rows[ids_N] = y_ND.to(self.rows.dtype)

    # -- precision

    @torch.no_grad()
    def rounded(self, dtype: str) -> TokenTableFFN:
        """Return a float32 copy whose rows are rounded as `pack(dtype)` rounds them."""
        twin = copy.deepcopy(self).float()
        if dtype == "bf16":
            twin.rows.copy_(twin.rows.bfloat16())
        elif dtype == "int8":
            codes, scale = quantise_neurons(twin.rows, self.config.bits)
            twin.rows.copy_(codes * scale.unsqueeze(-1))
        return twin

    def packed_share(self, dtype: str) -> float:
        small = (self.d_out * self.config.bits / 8 + 4) / (4 * self.d_out)
        return {"fp32": 1.0, "bf16": 0.5, "int8": small}[dtype]


def too_large(vocabulary: int) -> str:
    """Say what an id beyond the table means."""
    return (
        f"a token's id is beyond the {vocabulary} rows of a token table: was the model's embedding resized after "
        "convert?"
    )


def make_ids_up(module: nn.Module) -> None:
    """Let all token tables inside make ids up from their tokens: to time or test them outside a model."""
    for part in module.modules():
        if isinstance(part, TokenTableFFN):
            part.makes_ids_up = True
