"""One linear map, whole or of low rank.

Legend: N tokens, D width, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nogemm.config import layer_of
from nogemm.cost import Cost
from nogemm.layers._base import FFN
from nogemm.layers._tokens import each_alone
from nogemm.layers.dense.layer import DenseFFN, stored_of
from nogemm.layers.linear.config import LinearConfig
from nogemm.shape import FFNShape

_RIDGE = 1e-6  # of the inputs' mean variance


@layer_of(LinearConfig)
class LinearFFN(FFN):
    """Multiply by one matrix, or by two thin ones, and add a bias.

        y = W x + b          or          y = U (V x) + b

    | parameter | shape | |
    |---|---|---|
    | down.weight | [R, D], only with a rank | V |
    | up.weight, up.bias | [d_out, D] or [d_out, R], [d_out] | W or U, b |

    Wins nowhere but in cost; it is the rival that shows what an FFN's non-linearity is worth at a given cost.

    Cost: 2 D d_out FLOP, or 2 R (D + d_out).
    """

    dynamic_int8 = True

    def __init__(self, config: LinearConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: LinearConfig = config
        self.down = None if config.rank is None else nn.Linear(self.d_model, config.rank, bias=False)
        self.up = nn.Linear(self.d_model if config.rank is None else config.rank, self.d_out)
        for linear in (self.down, self.up):
            if linear is not None:
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(self.up.bias)

    def tokens(self, x_ND: Tensor) -> Tensor:
        return each_alone(lambda x: self.up(x if self.down is None else self.down(x)), x_ND)

    def cost(self, n_tokens: int = 1) -> Cost:
        rank = self.config.rank
        matrices = self.d_model * self.d_out if rank is None else rank * (self.d_model + self.d_out)
        parts = [part for linear in (self.down, self.up) if linear is not None for part in stored_of(linear)]
        read = sum(part.numel() * part.element_size() for part in parts)
        return Cost(2.0 * matrices * n_tokens, float(read if n_tokens else 0), sum(part.numel() for part in parts))

    def output_parameters(self) -> list[nn.Parameter]:
        return [p for p in (self.up.weight, self.up.bias) if isinstance(p, nn.Parameter)]

    @torch.no_grad()
    def solve(self, x_ND: Tensor, y_ND: Tensor) -> float:
        """Take the map that answers targets y best: least squares, of the wanted rank by a reduced-rank regression."""
        x, y = x_ND.double(), y_ND.double()
        mean_D, goal_D = x.mean(0), y.mean(0)
        x, y = x - mean_D, y - goal_D
        gram_DD = x.T @ x
        gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + 1e-12)
        map_DO = torch.linalg.solve(gram_DD, x.T @ y)
        if self.down is None:
            self.up.weight.copy_(map_DO.T)
        else:
            # The best map of a rank projects the answers of the best map on their leading directions.
            rank = self.down.out_features
            answers_OO = map_DO.T @ gram_DD @ map_DO
            lead_OR = torch.linalg.eigh(answers_OO).eigenvectors.flip(1)[:, :rank]
            used = lead_OR.shape[1]
            self.down.weight.zero_()
            self.up.weight.zero_()
            self.down.weight[:used].copy_((map_DO @ lead_OR).T)
            self.up.weight[:, :used].copy_(lead_OR)
            map_DO = map_DO @ lead_OR @ lead_OR.T
        self.up.bias.copy_(goal_D - mean_D @ map_DO)
        total = y.square().sum().clamp_min(1e-30)
        return float((y - x @ map_DO).square().sum() / total)

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Take the linear map that is nearest to the dense layer on these activations."""
        with torch.no_grad():
            self.solve(x_ND, dense.tokens(x_ND))
        self.fitted = "closed-form"
        return self.fitted
