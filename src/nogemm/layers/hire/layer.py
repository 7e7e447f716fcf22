"""HireFFN: a cheap sketch names candidate neurons, only those are computed, and the strongest few answer.

Legend: N tokens, D width, F neurons, E output width, K neurons per token, G groups of g, R width of the sketch.
Reading order: `HireFFN.tokens`, `choose`; the sketch is in `sketch.py`, the choice in `routing.py`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS, activation, cutoff
from nogemm.config import check_choice, check_int, layer_of
from nogemm.cost import Cost, distinct_rows
from nogemm.errors import ConfigError
from nogemm.layers._base import FFN, Route
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.hire.config import RELU_TYPES, HireConfig, SketchKind
from nogemm.layers.hire.fit import copy_dense, fit_data, fit_low_rank
from nogemm.layers.hire.report import HireReport, measure_recall
from nogemm.layers.hire.routing import Choice, choose
from nogemm.layers.hire.sketch import Sketch, make_sketch, quantise_neurons
from nogemm.ops import neuron_dot, neurons_at_indices
from nogemm.ops.sketch_and_select import SIGNED
from nogemm.shape import FFNShape


@layer_of(HireConfig)
class HireFFN(FFN):
    """Compute only the neurons that matter to a token.

        C = the oversample * keep F neurons with the largest sketched key        S = the keep F largest of C, exactly
        plain   y = bias + sum over S of act(<x, up_i> + up_bias_i) down_i
        gated   y = bias + sum over S of act(<x, gate_i> + gate_bias_i) (<x, up_i> + up_bias_i) down_i

    The key is |activation| of the neuron (of its gate), for ReLU types the pre-activation, which ranks alike. Training
    takes the same steps; gradients reach the neurons of S alone, and cost what they cost. While training, the int4
    sketch is replaced by the int8 one, which is quicker to make from weights that change.

    | parameter | shape |
    |---|---|
    | up, gate (if gated) | [F, D] |
    | up_bias, gate_bias | [F] |
    | down | [F, E], one row per neuron |
    | bias | [E] |

    With a low-rank sketch, buffers `sketch_reduce` [R, D] and `sketch_lift` [D, R]; static units, `always` (groups).

    Wins where a token uses few neurons: ReLU-type models, and models trained with top-k. Loses on plain SwiGLU or GELU
    weights (the small activations carry weight together) and at batches that share no neurons but need them all.

    Source: HiRE (Yerram et al., 2024) for sketch, groups and static units; statistical top-k from Spark Transformer.
    """

    has_sketch = True
    has_cutoff = True
    always: Tensor

    def __init__(self, config: HireConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: HireConfig = config
        d_model, hidden, gated = self.d_model, shape.neurons(), shape.gated
        activation = config.activation or shape.activation
        check_int("HireFFN", "hidden", hidden, 1)
        check_choice("HireFFN", "activation", activation, (*ACTIVATIONS, "drelu"))
        if activation == "drelu" and not gated:
            raise ConfigError('HireFFN: activation "drelu" needs a gated layer; a plain one has "relu"')
        if config.select == "active" and activation not in RELU_TYPES:
            raise ConfigError(f'HireFFN: select="active" needs a ReLU-type activation, got {activation!r}')
        if (config.select == "gaussian") != (shape.sparsity > 0):
            raise ConfigError(
                f'HireFFN: select="gaussian" is for dense networks with a cutoff of their own, and they take no other; '
                f"got select={config.select!r} for a network of sparsity {shape.sparsity}"
            )
        self.hidden, self.activation, self.gated = hidden, activation, gated
        self.up = nn.Parameter(torch.empty(hidden, d_model))
        self.up_bias = nn.Parameter(torch.zeros(hidden))
        self.gate = nn.Parameter(torch.empty(hidden, d_model)) if gated else None
        self.gate_bias = nn.Parameter(torch.zeros(hidden)) if gated else None
        self.down = nn.Parameter(torch.empty(hidden, self.d_out))
        self.bias = nn.Parameter(torch.zeros(self.d_out))
        groups = -(-hidden // config.group)
        self.kept = min(groups, math.ceil(math.ceil(config.keep * hidden - 1e-9) / config.group))
        self.candidates = min(groups, math.ceil(config.oversample * self.kept - 1e-9))
        static = -(-config.static // config.group)
        if static > self.kept:
            raise ConfigError(f"HireFFN: static={config.static} is more than keep={config.keep} of {hidden} neurons")
        rank = min(config.rank or max(1, d_model // 4), d_model)
        self.register_buffer("always", torch.arange(static))
        low_rank = config.sketch == "low_rank"
        self.register_buffer("sketch_reduce", torch.zeros(rank, d_model) if low_rank else None)
        self.register_buffer("sketch_lift", torch.zeros(d_model, rank) if low_rank else None)
        self._cached: tuple[object, Sketch] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights of nn.Linear's scale; a low-rank sketch starts from a random subspace."""
        for weight in (self.up, self.gate, self.down):
            if weight is not None:
                nn.init.normal_(weight, std=(3 * (self.hidden if weight is self.down else self.d_model)) ** -0.5)
        reduce, lift = self.get_buffer_or_none("sketch_reduce"), self.get_buffer_or_none("sketch_lift")
        if reduce is not None and lift is not None:
            nn.init.normal_(reduce, std=self.d_model**-0.5)
            lift.copy_(reduce.T)

    def get_buffer_or_none(self, name: str) -> Tensor | None:
        """Return a buffer that only some configs have."""
        return self._buffers.get(name)

    def compute_dtype(self) -> torch.dtype:
        return self.up.dtype

    @property
    def selector(self) -> tuple[Tensor, Tensor]:
        """Weights and biases that decide: the gate's, or those of a plain layer."""
        if self.gate is not None and self.gate_bias is not None:
            return self.gate, self.gate_bias
        return self.up, self.up_bias

    @property
    def key(self) -> str:
        """How pre-activations are ranked, see `nogemm.ops.sketch_and_select`."""
        if self.activation in RELU_TYPES:
            return SIGNED if self.config.group == 1 else "relu"
        return activation(self.activation).name

    def sketch(self) -> Sketch:
        """Return the sketch of the weights as they are now; it is made again when they change."""
        weight, _ = self.selector
        kind = "int8" if self.training and self.config.sketch == "int4" else self.config.sketch
        reduce, lift = self.get_buffer_or_none("sketch_reduce"), self.get_buffer_or_none("sketch_lift")
        parts = [t for t in (weight, reduce, lift) if t is not None]
        if any(t.is_inference() for t in parts):
            return make_sketch(weight, kind, reduce, lift)
        state = (kind, *((t.data_ptr(), t._version, t.dtype) for t in parts))
        if self._cached is None or self._cached[0] != state:
            self._cached = (state, make_sketch(weight, kind, reduce, lift))
        return self._cached[1]

    def choose(self, x_ND: Tensor) -> Choice:
        """Name the neurons that are computed exactly and those that answer, see `routing.choose`."""
        return choose(self, x_ND)

    def routes(self, x_ND: Tensor) -> Route:
        kept_NK = self.choose(x_ND).kept_NK
        first, second = activations(self.activation)
        weights_NK = first(self.selecting(x_ND, kept_NK))
        if self.gated:
            up_NK = neuron_dot(x_ND, kept_NK, self.up, self.up_bias)
            weights_NK = weights_NK * (up_NK if second is None else second(up_NK))
        return Route(kept_NK, weights_NK.masked_fill(kept_NK < 0, 0.0))

    def tokens(self, x_ND: Tensor) -> Tensor:
        chosen = self.choose(x_ND)
        if torch.is_grad_enabled() and self.selector[0].requires_grad:
            self._cached = None  # the step that follows may leave no trace: torch's fused optimisers count no version
        return self.at(x_ND, chosen.kept_NK, chosen.known_NK)

    def selecting(self, x_ND: Tensor, index_NK: Tensor) -> Tensor:
        """Return what the activation of the named neurons is taken of, [N, K]."""
        dots_NK = neuron_dot(x_ND, index_NK, *self.selector)
        return dots_NK - self.cutoff(x_ND).to(dots_NK.dtype) if self.config.select == "gaussian" else dots_NK

    def cutoff(self, x_ND: Tensor) -> Tensor:
        """Return the dense network's own cutoff for each token, float32 [N, 1], by all pre-activations."""
        return cutoff(F.linear(x_ND, *self.selector).float(), 1.0 - self.shape.sparsity)

    def at(self, x_ND: Tensor, index_NK: Tensor, known_NK: Tensor | None = None) -> Tensor:
        """Answer with the given neurons only; `known` as in `nogemm.ops.neurons_at_indices`."""
        first, second = activations(self.activation)
        if known_NK is None and self.config.select == "gaussian":
            known_NK = self.selecting(x_ND, index_NK).detach()
        y_NE = neurons_at_indices(
            x_ND,
            index_NK,
            self.up,
            self.up_bias,
            self.down,
            first,
            gate_FD=self.gate,
            gate_bias_F=self.gate_bias,
            up_activation=second,
            known_NK=known_NK,
        )
        return y_NE + self.bias

    def cost(self, n_tokens: int = 1) -> Cost:
        """Count the sketch, the candidates' exact products and the kept neurons."""
        reduce, lift = self.get_buffer_or_none("sketch_reduce"), self.get_buffer_or_none("sketch_lift")
        stored = sum(p.numel() for p in (*self.parameters(), reduce, lift) if p is not None)
        exact, kept = self._exact_and_kept()
        if exact == self.hidden:
            flops = 0.0
        elif reduce is not None:
            flops = 2.0 * len(reduce) * (self.d_model + self.hidden)
        else:
            flops = 2.0 * self.d_model * self.hidden
        flops += 2.0 * (exact * self.d_model + kept * (self.d_model * self.gated + self.d_out))
        if self.config.select == "gaussian":
            flops += self.d_model**2
        sketch, rows = self.traffic(n_tokens)
        return Cost(n_tokens * flops, sketch + rows * self.up.element_size(), stored)

    def traffic(self, n_tokens: int = 1) -> tuple[float, float]:
        """Return the bytes of the sketch, and how many numbers of rows `n_tokens` tokens touch."""
        if n_tokens == 0:
            return 0.0, 0.0
        exact, kept = self._exact_and_kept()
        reduce = self.get_buffer_or_none("sketch_reduce")
        sketch = self.d_model * self.hidden * (0.5 if self.config.sketch == "int4" else 1.0)
        if reduce is not None:
            sketch = len(reduce) * (4.0 * self.d_model + self.hidden)
        rows = self._touched(n_tokens, exact) * self.d_model
        rows += self._touched(n_tokens, kept) * (self.d_model * self.gated + self.d_out)
        moments = 2.0 * self.d_model**2 if self.config.select == "gaussian" else 0.0  # a float32 triangle
        return moments + (0.0 if exact == self.hidden else sketch), rows

    def _exact_and_kept(self) -> tuple[int, int]:
        """Count the neurons of a token that are computed exactly, and that are kept."""
        exact = min(self.hidden, self.candidates * self.config.group)
        return exact, min(exact, self.kept * self.config.group)

    def _touched(self, n_tokens: int, per_token: int) -> float:
        """Expect the number of distinct neurons, if tokens chose theirs independently and uniformly."""
        return float(self.hidden) if per_token >= self.hidden else distinct_rows(n_tokens * per_token, self.hidden)

    def output_parameters(self) -> list[nn.Parameter]:
        return [self.down, self.bias]

    def fit_dense(self, dense: DenseFFN) -> str:
        """Copy the dense layer: exact where no neuron that fires is left out, up to what the sketch misses."""
        if copy_dense(self, dense):
            self.fit_sketch()
            whole = self.config.select in ("active", "gaussian") or self.config.keep >= 1
            self.fitted = "exact" if whole and dense.activation == self.activation else "closed-form"
        return self.fitted

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Copy the dense layer; fit sketch, static units and output bias to activations x (see `fit.py`)."""
        if self.fit_dense(dense) != "random":
            fit_data(self, dense, x_ND)
        return self.fitted

    def fit_sketch(self, x_ND: Tensor | None = None) -> None:
        """Fit a low-rank sketch to the weights as they are, whitened by activations x; others need no fit."""
        fit_low_rank(self, x_ND)

    def fit_own_weights(self) -> None:
        self.fit_sketch()

    def measured(self, x_ND: Tensor, n_tokens: int, dtype: str) -> dict[str, float]:
        """Say what the sketch finds, and how many bytes a call and the layer have: the twin holds float32 rows."""
        report = self.measure(x_ND)
        itemsize = {"fp32": 4, "bf16": 2, "int8": 1}[dtype]
        sketch, rows = self.traffic(n_tokens)
        stored = sum(p.numel() for p in self.parameters()) * itemsize + sketch
        found = {"recall": report.recall, "energy": report.energy, "dense_energy": report.dense_energy}
        return found | {"bytes_read": sketch + rows * itemsize, "weight_bytes": stored}

    def measure(self, x: Tensor) -> HireReport:
        """Compare what the sketch finds with what exact arithmetic would keep, on tokens x [..., D]."""
        return measure_recall(self, x.reshape(-1, self.d_model).to(self.compute_dtype()))

    def recall_rows(
        self,
        x_ND: Tensor,
        sketches: Sequence[SketchKind] = ("int8", "int4"),
        oversample: Sequence[float] = (1.2, 1.5, 2.0),
    ) -> list[dict[str, Any]]:
        """Measure these weights with each sketch at each oversampling.

        Returns:
            rows with "sketch", "oversample", "keep", and the fields of `HireReport`.
        """
        rows = []
        for sketch in sketches:
            for factor in oversample:
                twin = HireFFN(replace(self.config, sketch=sketch, oversample=factor), self.shape)
                twin.load_state_dict(self.state_dict(), strict=False)  # a low-rank sketch stays behind
                report = twin.eval().measure(x_ND)
                rows.append({"sketch": sketch, "oversample": factor, "keep": self.config.keep, **vars(report)})
        return rows

    def active_neurons(self) -> int:
        return min(self.hidden, self.kept * self.config.group)

    def rounded(self, dtype: str) -> HireFFN:
        """Return a float32 copy whose rows are rounded as `pack(dtype)` rounds them."""
        twin = copy.deepcopy(self).float().eval().requires_grad_(False)
        for rows in (twin.up, twin.gate, twin.down):
            if rows is not None and dtype == "bf16":
                rows.copy_(rows.bfloat16())
            elif rows is not None and dtype == "int8":
                codes, scale = quantise_neurons(rows, 8)
                rows.copy_(codes * scale.unsqueeze(-1))
        return twin


def activations(name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor] | None]:
    """Return the activation of the gate (or of a plain layer), and that of the gated branch if it has one."""
    return (F.relu, F.relu) if name == "drelu" else (ACTIVATIONS[name], None)
