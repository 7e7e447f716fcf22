"""YOSO as a feed-forward layer: neurons are hashed, their values summed per bucket, and a token reads its buckets.

Legend: N tokens, D width, F neurons, T hashes (tables), K bits per hash, R = 2^K rows per table.
Reading order: `YosoFFN.tokens`, `expected`, `hashed`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.config import (
    ProjectionConfig,
    layer_of,
)
from nogemm.cost import Cost, distinct_rows
from nogemm.errors import ConfigError
from nogemm.layers._base import FFN, Route
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.lookup.layer import rows_of
from nogemm.layers.yoso.config import YosoConfig
from nogemm.layers.yoso.fit import fit_neurons, fit_values
from nogemm.ops import bucket_sum, gather_accumulate, hash_codes
from nogemm.projections import DiagonalChain, Projection, RandomHadamardConfig
from nogemm.projections._padded import random_signs
from nogemm.shape import FFNShape

# Numbers in the tables that exist at a time while an unpacked layer runs: 64 MB in float32.
TABLE_NUMBERS = 1 << 24


# Tokens hashed at a time: their transforms stay in a core's cache.
HASH_CHUNK = 128


# arccos has an infinite slope at 1; the reference caps 1 / sqrt(1 - c^2) at 10.
LARGEST_COSINE = math.sqrt(1.0 - 0.01)


@layer_of(YosoConfig)
class YosoFFN(FFN):
    """Sum the values of the neurons that collide with the token, in proportion to how often they do.

        q = norm(x);   f_t(v) = K sign bits of one group of D1 H D2 H D3 H v
        sampled:   y = 1/T sum_t table_t[f_t(q)],   table_t[c] = sum over neurons i with f_t(key_i) = c of value_i
        expected:  y = sum_i (1 - arccos(cos(q, key_i)) / pi)^K value_i
        output:    y + bias,   or gain * y / |y| + bias with `unit`

    Training computes the expectation, a dense layer with the collision probability as its activation. Evaluation
    samples with signs drawn once, which are part of the state. If a gradient is asked for in evaluation, values get
    theirs from the sample and keys and inputs from the expectation.

    | parameter | shape | |
    |---|---|---|
    | norm.weight, norm.bias | [D] | if `norm` |
    | keys | [F, D] | only their directions count |
    | values | [F, d_out] | |
    | gain | [d_out] | if `gain` |
    | bias | [d_out] | |
    | hash.weight | random signs, see `DiagonalChain`, or the projection's | not trained |

    Packed, the tables are built once: T R d_out numbers, and the layer costs what a LookupFFN with signs for a
    projection costs. Wins where that memory is affordable and a rough sum suffices; loses accuracy to sampling noise.

    Source: YOSO (Zeng et al., 2021) as the baseline of LookupFFN (Zeng et al., 2023), equation 3. Differs, unless
    `faithful`, in frozen signs, the exact gradient, and an output that keeps its length. Not reproduced in either:
    the reference's CUDA kernels drop tokens beyond a multiple of four and one of two neurons that share a slot.
    """

    def __init__(self, config: YosoConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: YosoConfig = config
        d_model, hidden = self.d_model, shape.neurons(config.hidden)
        self.hidden = hidden
        self.unit = config.unit or config.faithful
        self.norm = nn.LayerNorm(d_model, eps=config.norm_eps) if config.norm else None
        self.keys = nn.Parameter(torch.empty(hidden, d_model))
        self.values = nn.Parameter(torch.empty(hidden, self.d_out))
        self.gain = nn.Parameter(torch.ones(self.d_out)) if config.gain else None
        self.bias = nn.Parameter(torch.empty(self.d_out))
        self.hash, self.groups = build_hash(d_model, config.hashes, config.bits, config.projection)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and signs as published."""
        nn.init.normal_(self.keys, std=0.02)
        nn.init.normal_(self.values, std=0.02)
        nn.init.normal_(self.bias, std=0.001)
        self.hash.reset_parameters("reference" if self.config.projection is None else "scaled")

    def routes(self, x_ND: Tensor) -> Route:
        codes_NT = self.codes(x_ND if self.norm is None else self.norm(x_ND), self.hash.weight)[0]
        rows_NP = rows_of(codes_NT.unsqueeze(-1), self.config.bits)
        return Route(rows_NP, torch.full(rows_NP.shape, 1.0 / self.config.hashes, dtype=x_ND.dtype))

    def tokens(self, x_ND: Tensor) -> Tensor:
        q_ND = x_ND if self.norm is None else self.norm(x_ND)
        if self.config.faithful:
            y_ND = self.hashed(q_ND, fresh=True)
        elif self.training:
            y_ND = self.expected(q_ND)
        else:
            y_ND = self.hashed(q_ND)
        return self.finish(y_ND)

    def finish(self, y_ND: Tensor) -> Tensor:
        """Apply what comes after the sum: length one, gain, bias."""
        if self.unit:
            y_ND = F.normalize(y_ND, dim=-1)
        if self.gain is not None:
            y_ND = y_ND * self.gain
        return y_ND + self.bias

    def expected(self, q_ND: Tensor) -> Tensor:
        """Return the expectation over all hashes, sum_i p_i^K value_i."""
        return self.collision_probability(cosines(q_ND, self.keys)) @ self.values

    def collision_probability(self, cosine: Tensor) -> Tensor:
        """Return (1 - arccos(c) / pi)^K, the chance that all K bits agree."""
        bounded = cosine.clamp(-LARGEST_COSINE, LARGEST_COSINE) if cosine.requires_grad else cosine.clamp(-1.0, 1.0)
        return (1.0 - torch.arccos(bounded) / math.pi) ** self.config.bits

    def hashed(self, q_ND: Tensor, fresh: bool = False) -> Tensor:
        """Return the sample over this layer's hashes, or over fresh ones, with the expectation's gradient."""
        signs = random_signs(self.hash.weight) if fresh else self.hash.weight
        codes_NT, finite_N1 = self.codes(q_ND, signs)
        codes_FT = self.codes(self.keys, signs)[0]
        rows, tables = 2**self.config.bits, self.config.hashes
        y_ND = q_ND.new_zeros(q_ND.shape[0], self.d_out)
        step = max(1, TABLE_NUMBERS // (rows * self.d_out))
        for first in range(0, tables, step):
            part = slice(first, first + step)
            chosen_NTF = codes_NT[:, part].unsqueeze(-1).contiguous()
            scores = torch.full(chosen_NTF.shape, 1.0 / tables, dtype=q_ND.dtype, device=q_ND.device)
            table_TRD = bucket_sum(self.values, codes_FT[:, part].contiguous(), rows)
            y_ND = y_ND + gather_accumulate(chosen_NTF, scores, table_TRD)
        if torch.is_grad_enabled() and (q_ND.requires_grad or self.keys.requires_grad):
            surrogate = self._surrogate(q_ND, codes_NT, codes_FT)
            y_ND = y_ND + (surrogate - surrogate.detach())
        return torch.where(finite_N1, y_ND, float("nan"))

    def _surrogate(self, q_ND: Tensor, codes_NT: Tensor, codes_FT: Tensor) -> Tensor:
        """Return something whose gradient to queries and keys is the expectation's, or the published one's."""
        values = self.values.detach()
        cosine_NF = cosines(q_ND, self.keys)
        if not self.config.faithful:
            return self.collision_probability(cosine_NF) @ values
        bits = self.config.bits
        shrunk_NF = 0.99 * cosine_NF.detach()
        p_NF = 1.0 - torch.arccos(shrunk_NF.clamp(-1.0, 1.0)) / math.pi
        steep_NF = torch.rsqrt((1.0 - shrunk_NF.square()).clamp_min(0.01)) / math.pi
        slope_NF = bits * p_NF ** (bits - 1) * steep_NF
        collide_NF = torch.zeros_like(cosine_NF, dtype=torch.bool)
        for mine_N, theirs_F in zip(codes_NT.T, codes_FT.T, strict=True):
            collide_NF |= mine_N.unsqueeze(1) == theirs_F
        return (collide_NF * slope_NF * cosine_NF) @ values

    def codes(self, v_ND: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the code of each vector under each hash, int32 [N, T], and which vectors are finite, [N, 1]."""
        with torch.no_grad():
            return hash_vectors(self.hash, v_ND, signs, self.groups, self.config.hashes, self.config.bits)

    def cost(self, n_tokens: int = 1) -> Cost:
        """Count the packed form: hashing and one row of each table; tables are not parameters."""
        itemsize = self.values.element_size()
        hashing = self.hash.cost(itemsize)
        small = sum(p.numel() for p in self.parameters()) - self.keys.numel() - self.values.numel()
        rows = self.config.hashes * distinct_rows(n_tokens, 2**self.config.bits)
        return Cost(
            n_tokens * (hashing.flops + 2.0 * self.config.hashes * self.d_out),
            rows * self.d_out * itemsize + (hashing.bytes_read + small * itemsize if n_tokens else 0.0),
            sum(p.numel() for p in self.parameters()),
        )

    def computes_in(self, dtype: str) -> str:
        return "fp32" if dtype == "fp32" else "int16"

    def output_parameters(self) -> list[nn.Parameter]:
        if self.unit and self.gain is None:
            raise ConfigError("YosoConfig: unit=True gives every answer length one, so no weights make it zero")
        return [self.values if self.gain is None else self.gain, self.bias]

    def fit_dense(self, dense: DenseFFN) -> str:
        """Take the dense neurons' directions, and for each the best multiple of its output (see `fit.py`)."""
        if not self.unit and fit_neurons(self, dense):
            self.fitted = "closed-form"
        return self.fitted

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Take the dense neurons' directions and solve for all values at once (see `fit.py`)."""
        if not self.unit:
            fit_values(self, dense, x_ND)
            self.fitted = "closed-form"
        return self.fitted


def build_hash(d_model: int, hashes: int, bits: int, projection: ProjectionConfig | None) -> tuple[Projection, int]:
    """Make the sign transform for `hashes` codes of `bits` bits, and say how many codes one transform gives.

    As published, a code never straddles two transforms, so floor(D / K) codes come from each. A projection in its place
    gives all codes; that is said by 0.
    """
    if projection is not None:
        own = projection.build(d_model, hashes * bits)
        own.bias = None  # keys and queries have different lengths: an offset would turn their angle
        own.freeze()
        return own, 0
    width = 1 << max(d_model - 1, 0).bit_length()
    if bits > width:
        raise ConfigError(f"YosoConfig: bits={bits} needs a width of at least {bits}, got d_model={d_model}")
    groups = width // bits
    hashing = RandomHadamardConfig(bias=False).build(d_model, math.ceil(hashes / groups) * width)
    return hashing, groups


def hash_vectors(
    hashing: Projection, v_ND: Tensor, signs: Tensor, groups: int, hashes: int, bits: int
) -> tuple[Tensor, Tensor]:
    """Return codes int32 [N, T] of vectors, and which vectors are finite [N, 1]."""
    if v_ND.shape[0] > HASH_CHUNK:
        parts = [hash_vectors(hashing, part, signs, groups, hashes, bits) for part in v_ND.split(HASH_CHUNK)]
        return torch.cat([codes for codes, _ in parts]), torch.cat([finite for _, finite in parts])
    if groups == 0:
        z_NM = hashing(v_ND)
    else:
        assert isinstance(hashing, DiagonalChain)
        z = hashing.chain(F.pad(v_ND, (0, hashing.width - hashing.d_in)), signs)
        z_NM = z.view(v_ND.shape[0], hashing.repeats, hashing.width)[:, :, : groups * bits].flatten(1)
    codes_NTF, scores_NTF = hash_codes(z_NM[:, : hashes * bits].contiguous(), bits, 1, False)
    return codes_NTF.squeeze(-1), scores_NTF.isfinite().all(1)


def cosines(q_ND: Tensor, keys_FD: Tensor) -> Tensor:
    """Return the cosine of every query with every key, [N, F]."""
    return F.normalize(q_ND, dim=-1) @ F.normalize(keys_FD, dim=-1).T
