"""Switch: a linear router sends each token to one of a few dense experts.

Legend: N tokens, D width, E experts, F hidden width of an expert.
Reading order: `SwitchFFN.tokens`, `routing`; who gets which token is in `routing.py`.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import layer_of
from nogemm.cost import Cost, distinct_rows
from nogemm.errors import ConfigError
from nogemm.layers._auxiliary import PUBLISHED_DROPOUT, attach_loss, drop_input
from nogemm.layers._base import FFN, Route
from nogemm.layers.dense.config import DenseConfig
from nogemm.layers.dense.layer import DenseFFN, round_dense, stored_of
from nogemm.layers.switch.config import SwitchConfig
from nogemm.layers.switch.fit import carve, upcycle
from nogemm.layers.switch.routing import Routing, choose_experts, dispatch
from nogemm.projections import Projection
from nogemm.shape import FFNShape

# Of the published router: inputs are multiplied by a uniform number from 1 - JITTER to 1 + JITTER.
JITTER = 0.01


@layer_of(SwitchConfig)
class SwitchFFN(FFN):
    """Answer each token by the one expert that the router prefers, weighted by its probability.

        p = softmax(W_r v + b_r),   v = norm(x);   e = argmax p (ties: the lowest)
        y = p_e expert_e(v)

    While a gradient is computed, balance_weight * balance loss + z_weight * z-loss is added to whatever is minimised,
    so no trainer has to know of them; `routing` returns both for those who set the weights to 0 and add them by hand.

    | parameter | shape |
    |---|---|
    | router.weight, router.bias | [E, D], [E], or the projection's |
    | experts.e.up, .down (.gate) | as in `DenseFFN` |
    | norm.weight | [D], if `norm` |

    Wins where many parameters at the arithmetic of few are wanted and batches are small; loses where memory is short,
    and where tokens crowd into a few experts.

    Source: Switch Transformer (Fedus et al., 2022), as the baseline of LookupFFN (Zeng et al., 2023). Differs, unless
    `faithful`, in biases, and in the auxiliary losses that the baseline lacked.
    """

    def __init__(self, config: SwitchConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: SwitchConfig = config
        d_model = self.d_model
        if config.faithful and self.d_out != d_model:
            raise ConfigError(
                f"SwitchConfig: faithful=True adds the input to the output, so d_out must be d_model={d_model}, "
                f"got d_out={self.d_out}"
            )
        self.hidden = shape.neurons(config.hidden)
        if config.faithful:
            shape = replace(shape, activation="relu", gated=False)
        expert = DenseConfig(hidden=self.hidden, activation="relu" if config.faithful else config.activation)
        self.norm = nn.RMSNorm(d_model, eps=1e-6) if config.norm or config.faithful else None
        self.router: nn.Linear | Projection
        if config.projection is None:
            self.router = nn.Linear(d_model, config.experts, bias=not config.faithful)
        else:
            self.router = config.projection.build(d_model, config.experts)
        self.experts = nn.ModuleList(DenseFFN(expert, shape, bias=not config.faithful) for _ in range(config.experts))
        if config.faithful:
            for parameter in (*self.router.parameters(), *self.experts.parameters()):
                nn.init.normal_(parameter, std=0.02)
            for expert in self.experts:
                expert.get_submodule("down").register_forward_pre_hook(drop_input)

    def tokens(self, x_ND: Tensor) -> Tensor:
        v_ND = x_ND if self.norm is None else self.norm(x_ND)
        if self.config.faithful:
            v_ND = v_ND * torch.empty_like(v_ND).uniform_(1.0 - JITTER, 1.0 + JITTER)
        routing = self.routing(v_ND)
        y_ND = dispatch(list(self.experts), routing, v_ND, self.d_out)
        if self.config.faithful:
            return x_ND + F.dropout(y_ND, PUBLISHED_DROPOUT, self.training)
        loss = self.config.balance_weight * routing.balance_loss + self.config.z_weight * routing.z_loss
        return attach_loss(y_ND, loss) if torch.is_grad_enabled() and loss.requires_grad else y_ND

    def rounded(self, dtype: str) -> FFN:
        return super().rounded(dtype) if dtype != "int8" else round_dense(copy.deepcopy(self))

    def packed_share(self, dtype: str) -> float:
        return 0.25 if dtype == "int8" else 1.0

    def routes(self, x_ND: Tensor) -> Route:
        routing = self.routing(x_ND if self.norm is None else self.norm(x_ND))
        return routing.route()

    def routing(self, v_ND: Tensor) -> Routing:
        """Choose experts for (normed) tokens; both losses are differentiable."""
        capacity = self.config.capacity if self.training else self.config.evaluation_capacity
        return choose_experts(self.router(v_ND), capacity)

    def cost(self, n_tokens: int = 1) -> Cost:
        first = self.experts[0]
        assert isinstance(first, DenseFFN)
        one = first.cost(1)
        routing = self._router_cost()
        small = 0 if self.norm is None else sum(p.numel() for p in self.norm.parameters())
        fixed = small * self.compute_dtype().itemsize + routing.bytes_read
        return Cost(
            n_tokens * (one.flops + routing.flops),
            distinct_rows(n_tokens, self.config.experts) * one.bytes_read + (fixed if n_tokens else 0.0),
            self.config.experts * one.parameters + small + routing.parameters,
        )

    def _router_cost(self) -> Cost:
        if isinstance(self.router, Projection):
            return self.router.cost(self.compute_dtype().itemsize)
        parts = stored_of(self.router)
        read = sum(part.numel() * part.element_size() for part in parts)
        return Cost(2.0 * self.d_model * self.config.experts, float(read), sum(part.numel() for part in parts))

    def output_parameters(self) -> list[nn.Parameter]:
        if self.config.faithful:
            raise ConfigError("SwitchConfig: faithful=True adds the input to the output, so no weights make it zero")
        return [p for expert in self.experts for p in expert.output_parameters()]  # type: ignore[operator]

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return the router's weights, an optimiser group of their own."""
        return self.router.weights() if isinstance(self.router, Projection) else [self.router.get_parameter("weight")]

    def fit_dense(self, dense: DenseFFN) -> str:
        """Start every expert as a copy of the dense layer, if the widths are equal (see `fit.py`)."""
        if not self.config.faithful and upcycle(self, dense):
            self.fitted = "closed-form"
        return self.fitted

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Cluster the tokens and give each cluster the neurons that matter to it (see `fit.py`)."""
        if not self.config.faithful and carve(self, dense, x_ND):
            self.fitted = "closed-form"
        return self.fitted
