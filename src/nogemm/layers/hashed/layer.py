"""What SLIDE and MONGOOSE share: neurons in hash tables, of which a token computes those it collides with.

Legend: N tokens, D width, F neurons, T tables, K bits per table, M = T K, m tokens in a chunk, C chunks, J chosen
neurons.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.cost import Cost
from nogemm.layers._base import FFN, Route
from nogemm.layers.dense.config import DenseConfig
from nogemm.layers.dense.layer import DenseFFN, round_dense, weights_of
from nogemm.layers.hashed.config import HashedConfig
from nogemm.layers.hire.sketch import lists_of
from nogemm.ops import bucket_union, hash_codes
from nogemm.projections import Projection
from nogemm.projections._padded import random_signs
from nogemm.shape import FFNShape


class HashedNeurons(FFN):
    """A dense layer in which each token computes only the neurons that its hashes retrieve; the others count as 0.

        bits of a vector v: signs of [v; 1] P, cut into T codes of K bits; neurons are hashed as [w_i; b_i]
        S(chunk) = neurons that share a code with a token of the chunk in at least one table
        y = sum over i in S of act(w_i v + b_i) down_i + bias

    P is a matrix, or a projection of v with its bias for the last row. While a gradient is computed, every neuron is
    computed and masked, so each update moves retrieved neurons only.
    """

    planes: Tensor  # without a projection
    retrieves = True
    falls_back: ClassVar[bool] = False  # whether a chunk without any neuron computes its tokens' best ones

    def __init__(self, config: HashedConfig[Any], shape: FFNShape) -> None:
        super().__init__(config, shape)
        d_model = self.d_model
        self.bits, self.tables, self.chunk = config.bits, config.tables, config.chunk
        self.norm = nn.LayerNorm(d_model) if config.norm else None
        self.projection = None
        if config.projection is not None:
            self.projection = config.projection.build(d_model, config.bits * config.tables)
            if self.projection.bias is not None:  # what a plane of signs has there, at a projection's scale
                with torch.no_grad():
                    self.projection.bias.copy_(random_signs(self.projection.bias) * d_model**-0.5)
        self.neurons = DenseFFN(DenseConfig(hidden=config.hidden, activation=config.activation), shape)
        self.hidden = self.neurons.hidden
        if config.faithful:
            start_as_published(self.neurons)

    @abstractmethod
    def neuron_codes(self) -> Tensor:
        """Return the bucket of each neuron in each table, int32 [F, T]."""

    @property
    def hashing(self) -> Tensor | Projection:
        """Return what hashes: the planes [D + 1, M], or the projection in their place."""
        return self.planes if self.projection is None else self.projection

    def hashed(self, v_ND: Tensor, last_N: Tensor | None = None) -> Tensor:
        """Return codes int32 [N, T] of vectors extended by one number (1 for tokens)."""
        with torch.no_grad():
            return hash_extended(v_ND, last_N, self.hashing, self.bits)

    def hash_neurons(self) -> Tensor:
        """Hash the neurons as they are now, [F, T]."""
        linear = self.neurons.up if self.neurons.gate is None else self.neurons.gate
        return self.hashed(*weights_of(linear))

    def retrieved(self, v_ND: Tensor) -> Tensor:
        """Return which neurons each (normed) token's chunk computes, bool [N, F]."""
        mask_NF = union_of_chunks(bucket_union(self.hashed(v_ND), self.neuron_codes().T), v_ND, self.chunk)
        first = self.neurons.up if self.neurons.gate is None else self.neurons.gate
        return with_best(mask_NF, v_ND, self.chunk, first) if self.falls_back else mask_NF

    def output_parameters(self) -> list[nn.Parameter]:
        return self.neurons.output_parameters()

    def rounded(self, dtype: str) -> FFN:
        return super().rounded(dtype) if dtype != "int8" else round_dense(copy.deepcopy(self))

    def packed_share(self, dtype: str) -> float:
        return 0.25 if dtype == "int8" else 1.0

    def routes(self, x_ND: Tensor) -> Route:
        v_ND = x_ND if self.norm is None else self.norm(x_ND)
        rows_NP = lists_of(self.retrieved(v_ND))
        hidden_NF = self.neurons.hidden_activations(v_ND)
        return Route(rows_NP, hidden_NF.gather(1, rows_NP.clamp_min(0).long()).masked_fill(rows_NP < 0, 0.0))

    def masked(self, v_ND: Tensor, mask_NF: Tensor) -> Tensor:
        """Compute all neurons and use those of the mask; a token that is not finite answers NaN."""
        hidden_NF = self.neurons.hidden_activations(v_ND)
        broken_N1 = ~v_ND.isfinite().all(1, keepdim=True)
        y_ND = self.neurons.down(torch.where(mask_NF, hidden_NF, 0.0))
        return torch.where(broken_N1, float("nan"), y_ND)

    def active(self, x: Tensor) -> Tensor:
        """Count the neurons that each token computes: the measured |S|, int64 [N]."""
        with torch.no_grad():
            x_ND = x.reshape(-1, self.d_model).to(self.compute_dtype())
            return self.retrieved(x_ND if self.norm is None else self.norm(x_ND)).sum(1)

    def counted_neurons(self, x_ND: Tensor) -> dict[str, Any]:
        """Count the neurons that tokens compute, beside what uniform codes would retrieve.

        Returns:
            {"tokens", "chunk", "mean", "p95", "expected"} in neurons, and "flops" and "expected_flops" of one token,
            hashing included. The tokens should fill whole chunks.
        """
        count = len(x_ND)
        active_N = self.active(x_ND).double()
        expected = self.expected_active(min(self.chunk, count))
        expected_flops = self.cost(count).flops / count
        per_neuron = self.neurons.cost(1).flops / self.hidden
        mean = float(active_N.mean())
        return {
            "tokens": count,
            "chunk": self.chunk,
            "mean": mean,
            "p95": float(active_N.quantile(0.95)),
            "expected": expected,
            "flops": expected_flops + per_neuron * (mean - expected),
            "expected_flops": expected_flops,
        }

    def expected_active(self, n_tokens: int) -> float:
        """Return E|S| of a chunk of `n_tokens` under independent uniform codes, F (1 - (1 - 2^-K)^(T n))."""
        return self.hidden * (1.0 - (1.0 - 2.0**-self.bits) ** (self.tables * n_tokens))

    def cost(self, n_tokens: int = 1) -> Cost:
        """Count hashing and the expected neurons under uniform codes; real codes are skewed, see `active`."""
        neurons, itemsize = self.neurons.cost(1), self.compute_dtype().itemsize
        hashing, read, trained = self._hashing_cost()
        computed = self.expected_active(min(self.chunk, max(n_tokens, 1)))
        others = sum(p.numel() for p in self.parameters()) - sum(p.numel() for p in self.neurons.parameters())
        fixed = (others - trained + self.d_out) * itemsize + read + 4.0 * self.hidden * self.tables
        touched = self.expected_active(n_tokens) / self.hidden * (neurons.bytes_read - self.d_out * itemsize)
        return Cost(
            n_tokens * (hashing + neurons.flops / self.hidden * computed),
            touched + fixed if n_tokens else 0.0,
            others + neurons.parameters,
        )

    def _hashing_cost(self) -> tuple[float, float, int]:
        """Return FLOP of hashing one token, bytes of what hashes, and how many of its numbers are parameters."""
        itemsize = self.compute_dtype().itemsize
        if self.projection is not None:
            cost = self.projection.cost(itemsize)
            return cost.flops, cost.bytes_read, sum(p.numel() for p in self.projection.parameters())
        count = self.planes.numel()
        return 2.0 * count, float(count * itemsize), count if isinstance(self.planes, nn.Parameter) else 0


def start_as_published(neurons: DenseFFN) -> None:
    """Draw N(0, 0.02^2) for what reads the token, without biases, and +-1/sqrt(F) uniformly for what writes."""
    for linear in (neurons.up, neurons.gate):
        if linear is not None:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
    for parameter in neurons.down.parameters():
        nn.init.uniform_(parameter, -(neurons.hidden**-0.5), neurons.hidden**-0.5)


def extended_product(v_ND: Tensor, last_N: Tensor | None, hashing: Tensor | Projection) -> Tensor:
    """Return what is hashed of [v; last], [N, M]; `last` is 1 where none is given."""
    if isinstance(hashing, Projection):
        z_NM = hashing(v_ND)
        return z_NM if last_N is None or hashing.bias is None else z_NM + (last_N - 1.0).unsqueeze(1) * hashing.bias
    planes = hashing.to(v_ND.dtype)
    if last_N is None:
        return torch.addmm(planes[-1], v_ND, planes[:-1])
    return v_ND @ planes[:-1] + last_N.unsqueeze(1) * planes[-1]


def hash_extended(v_ND: Tensor, last_N: Tensor | None, hashing: Tensor | Projection, bits: int) -> Tensor:
    """Return the codes of [v; last], int32 [N, T]; `last` is 1 where none is given."""
    return hash_codes(extended_product(v_ND, last_N, hashing).contiguous(), bits, 1, False)[0].squeeze(-1)


def union_of_chunks(own_NF: Tensor, v_ND: Tensor, chunk: int) -> Tensor:
    """Give every token what any finite token of its chunk retrieved; chunks are consecutive tokens."""
    if chunk == 1:
        return own_NF
    own_NF = own_NF & v_ND.isfinite().all(1, keepdim=True)  # a broken token must not change its neighbours
    parts = [part.any(0, keepdim=True).expand_as(part) for part in own_NF.split(chunk)]
    return torch.cat(parts) if parts else own_NF


def with_best(mask_NF: Tensor, v_ND: Tensor, chunk: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """Give chunks that retrieved nothing the best neuron of each of their tokens."""
    empty_N = ~mask_NF.any(1)
    if not bool(empty_N.any()):
        return mask_NF
    with torch.no_grad():
        best_N = score(v_ND[empty_N]).argmax(1)
    mask_NF = mask_NF.clone()
    mask_NF[empty_N] = F.one_hot(best_N, mask_NF.shape[1]).bool()
    return union_of_chunks(mask_NF, v_ND, chunk)
