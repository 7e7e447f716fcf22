"""HireFFN packed for evaluation: one native call per layer, or the same steps in PyTorch without the extension."""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.activations import cutoff, deviations
from nogemm.layers._base import Kernel, PackedFFN, Route, packed_of
from nogemm.layers.hire.layer import HireFFN, activations
from nogemm.layers.hire.sketch import lists_of
from nogemm.layers.neurons.all import AllNeurons, dense_from, dense_us, rows_us
from nogemm.ops import native_available
from nogemm.ops.packed_hire import HireWeights, moment_rows, pack_hire, packed_hire, packed_hire_chosen
from nogemm.ops.sketch_and_select import selection_keys, top_indices


@packed_of(HireFFN)
class PackedHire(PackedFFN):
    """The evaluation twin of a HireFFN.

    dtype "fp32", "bf16", or "int8" with a scale per row: how the rows that are computed exactly are stored. The sketch
    is the layer's own. Sums are float32 (of int8 rows with 16-bit fixed-point tokens, exact integers); y has x's dtype.
    A neuron's rows lie side by side, so its weights are in memory once, beside the sketch.

    Candidates come from the native sketch whatever the path. Path "rows" reads the rows of candidates and kept neurons
    alone; "dense" widens all rows and multiplies, which pays for many tokens of a layer that keeps much. Its exact
    values differ in rounding only, so the same neurons answer, but for ties within it.
    """

    def __init__(self, layer: HireFFN, dtype: str) -> None:
        super().__init__(layer, dtype)
        self.native = native_available()
        self.hidden, self.gated = layer.hidden, layer.gate is not None
        self.key, self.kept, self.candidates = layer.key, layer.kept, layer.candidates
        self.select, self.group = layer.config.select, layer.config.group
        self.above = 1.0 - layer.shape.sparsity
        if self.native:
            weights = _weights(layer, dtype)
            with torch.no_grad():
                packed = pack_hire(weights, dtype)
            self.sketched = weights.codes is not None
            gate_bias = None if weights.gate_bias is None else weights.gate_bias.detach().float()
            biases = (gate_bias, weights.up_bias.detach().float())
            self.register_buffer("packed", packed, persistent=False)
            self.neurons = AllNeurons(packed, biases, *activations(layer.activation))
            self.register_buffer("bias", weights.bias.detach().float(), persistent=False)
            self.register_buffer("always", layer.always.detach().clone(), persistent=False)
        else:
            self.portable = layer.rounded(dtype)

    def fix_path(self, path: str) -> None:
        super().fix_path(path)
        first, last = self.d_model, self.d_out + self.d_model * self.gated
        read = min(self.hidden, self.kept * self.group) * last
        if self.select == "topk":  # otherwise both paths choose by the native exact products
            read += min(self.hidden, self.candidates * self.group) * first

        def rows(n: int) -> float:
            return rows_us(self.dtype, n, n * read)

        self.dense_from = dense_from(path, rows, lambda n: dense_us(self.dtype, n, self.hidden * (first + last)))

    @property
    def kernel(self) -> Kernel | None:
        if not self.native:
            return None
        return Kernel(number=2, phases=("sketch", "rows") if self.sketched else None, stops=False)

    def routes(self, x_ND: Tensor) -> Route:
        if not self.native:
            return self.portable.route(x_ND)
        return Route(lists_of(self.chosen_neurons(x_ND, kept=True)), None)

    def chosen_neurons(self, x_ND: Tensor, *, kept: bool) -> Tensor:
        return packed_hire_chosen(x_ND, self.get_buffer("packed"), self.hidden, kept)

    def tokens(self, x_ND: Tensor) -> Tensor:
        if not self.native:
            return self.portable(x_ND)
        if torch.compiler.is_compiling() or len(x_ND) < self.dense_from:
            return packed_hire(x_ND, self.get_buffer("packed"), self.d_out)
        x = x_ND.float()
        selecting_NF = self.neurons.selector(x)
        answering_NF = self._answering(x_ND, selecting_NF)
        if self.select == "gaussian":
            selecting_NF = torch.relu(selecting_NF - cutoff(selecting_NF, self.above))
        y_NE = self.neurons.masked(x, answering_NF, selecting_NF)
        return (y_NE + self.get_buffer("bias")).to(x_ND.dtype)

    def _answering(self, x_ND: Tensor, selecting_NF: Tensor) -> Tensor | None:
        """Mark the neurons that answer, given the exact values that select; None for all."""
        if self.select != "topk":
            return self.chosen_neurons(x_ND, kept=True)
        groups = -(-self.hidden // self.group)
        if self.kept >= groups:
            return None
        keys_NG = selection_keys(selecting_NF, self.key, self.group, self.get_buffer("always"))
        if self.sketched:
            candidate_NF = self.chosen_neurons(x_ND, kept=False)
            keys_NG = keys_NG.masked_fill(~candidate_NF[:, :: self.group], -torch.inf)
        best_NK = top_indices(keys_NG, self.kept).long()
        mask_NG = torch.zeros(keys_NG.shape, dtype=torch.bool).scatter_(1, best_NK, True)
        return mask_NG.repeat_interleave(self.group, 1)[:, : self.hidden]


def _weights(layer: HireFFN, dtype: str) -> HireWeights:
    """Collect what the kernel packs."""
    config = layer.config
    groups = -(-layer.hidden // config.group)
    wide = min(1.0, config.keep * config.oversample)
    everything = {"topk": layer.candidates >= groups, "statistical": wide >= 1, "active": config.keep >= 1}
    everything["gaussian"] = everything["active"]
    gaussian = config.select == "gaussian"
    sketch = None if everything[config.select] else layer.sketch()
    marginal = sketch is not None and config.select in ("active", "gaussian")
    error, size = sketch.margin_factors(layer.d_model) if sketch is not None and marginal else (None, None)
    return HireWeights(
        gate=layer.gate,
        gate_bias=layer.gate_bias,
        up=layer.up,
        up_bias=layer.up_bias,
        down=layer.down,
        bias=layer.bias,
        activation="relu" if layer.activation == "drelu" else layer.activation,
        up_relu=layer.activation == "drelu",
        key=layer.key,
        select=config.select,
        group=config.group,
        kept=layer.kept,
        candidates=layer.candidates,
        always=layer.always,
        keep_z=deviations(1.0 - layer.shape.sparsity if gaussian else config.keep),
        wide_z=deviations(wide),
        codes=None if sketch is None else sketch.codes_FR,
        scale=None if sketch is None else sketch.scale_F,
        reduce=None if sketch is None else sketch.reduce_RD,
        error=error,
        size=size,
        nibbles=config.sketch == "int4" and not layer.training,
        moments=moment_rows(*layer.rounded(dtype).selector) if gaussian else None,
    )
