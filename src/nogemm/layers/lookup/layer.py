"""LookupFFN: hash the token, read one row of each table, add the rows up.

Legend: N tokens, D width, T tables, K bits per table, R = 2^K rows per table, M = T K soft code bits, F neighbours.
Reading order: `LookupFFN.tokens`, `reset_parameters`, `cost`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from nogemm.config import check_choice, layer_of
from nogemm.cost import Cost, distinct_rows
from nogemm.errors import ConfigError
from nogemm.layers._base import FFN, Route
from nogemm.layers._scale import OUTPUT_STD
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.lookup.config import LookupConfig
from nogemm.layers.lookup.fit import fit_tables
from nogemm.ops import gather_accumulate, hash_codes, hash_codes_reference
from nogemm.ops._packing import integer_rows, rounded_rows
from nogemm.shape import FFNShape


@layer_of(LookupConfig)
class LookupFFN(FFN):
    """Replace a dense FFN by table look-ups chosen by a learned hash.

        z = projection(norm(x)), cut into T groups of K;   code, score = hash_codes(z)
        y = bias + sum_t sum_f score[t, f] * table[t, code[t, f]]

    | parameter | shape | trainable |
    |---|---|---|
    | norm.weight, norm.bias | [D] | yes (if `norm`) |
    | projection.weight, projection.bias | see the projection | yes |
    | tables | [T, R, d_out] | yes; compressed: bf16, or int8 with `row_scale` [T, R], no |
    | bias | [d_out] | yes |

    Wins where arithmetic is dear: at large batches, and at small ones while the touched rows stay small. Loses memory:
    tables hold T 2^K d_out numbers. Without neighbours the function jumps where a bit changes; with two it is
    continuous across single-bit boundaries.

    Source: LookupFFN (Zeng et al., 2023), equations 7, 8 and 11. Differs in the exact nearest neighbours, the
    orthonormal transform and the initialisation (see `LookupConfig.init`).
    """

    def __init__(self, config: LookupConfig, shape: FFNShape) -> None:
        super().__init__(config, shape)
        self.config: LookupConfig = config
        self.norm = nn.LayerNorm(self.d_model, eps=config.norm_eps) if config.norm else None
        self.projection = config.projection.build(self.d_model, config.tables * config.bits)
        self.bias = nn.Parameter(torch.empty(self.d_out)) if config.bias else None
        stored = (config.tables, 2**config.bits, self.d_out)
        self.tables: Tensor
        self.row_scale: Tensor | None
        if config.storage == "fp32":
            self.tables = nn.Parameter(torch.empty(stored))
            self.register_buffer("row_scale", None)
            if not self.tables.is_meta:  # there, weights will be loaded: their scale would be computed for nothing
                self.reset_parameters()
        else:
            self._store_compressed(torch.zeros(stored, dtype=_STORAGE[config.storage]), _unit_scale(config))
            if not self.tables.is_meta:
                self._reset_around_tables()

    def reset_parameters(self) -> None:
        """Draw fresh weights as `config.init` says."""
        config = self.config
        self._reset_around_tables()
        if config.init == "reference":
            nn.init.normal_(self.tables, std=0.02)
        else:
            energy = score_energy(config.bits, config.neighbours, config.score == "gelu")
            nn.init.normal_(self.tables, std=OUTPUT_STD / math.sqrt(config.tables * energy))

    def _reset_around_tables(self) -> None:
        """Draw what a layer of compressed tables, which start at zero, has in float as well."""
        self.projection.reset_parameters(self.config.init)
        if self.bias is not None:
            nn.init.normal_(self.bias, std=0.001 if self.config.init == "reference" else 0.0)

    def codes_and_scores(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows that each token reads and their weights, both [N, T, F]."""
        z_NM = self.projection(x_ND if self.norm is None else self.norm(x_ND))
        return hash_codes(z_NM, self.config.bits, self.config.neighbours, self.config.score == "gelu")

    def routes(self, x_ND: Tensor) -> Route:
        codes_NTF, scores_NTF = self.codes_and_scores(x_ND)
        return Route(rows_of(codes_NTF, self.config.bits), scores_NTF.flatten(1))

    def decisions(self, x_ND: Tensor) -> Tensor:
        z_NM = self.projection(x_ND if self.norm is None else self.norm(x_ND))
        return z_NM.unflatten(-1, (self.config.tables, self.config.bits))

    def decided(self, rows_NP: Tensor) -> Tensor:
        nearest_NT = rows_NP.unflatten(1, (self.config.tables, -1))[..., 0]
        places_K = torch.arange(self.config.bits - 1, -1, -1)
        return ((nearest_NT.unsqueeze(-1) >> places_K) & 1).bool()

    def tokens(self, x_ND: Tensor) -> Tensor:
        codes_NTF, scores_NTF = self.codes_and_scores(x_ND)
        y_ND = gather_accumulate(codes_NTF, scores_NTF, self.stored_rows(), self.row_scale)
        return y_ND if self.bias is None else y_ND + self.bias

    def stored_rows(self) -> Tensor:
        """Return the tables as tokens read them: float tables are rounded where `config.row_bits` says so."""
        bits = self.config.row_bits
        return self.tables if bits is None or self.storage != "fp32" else rounded_rows(self.tables, bits)

    def integer_rows(self) -> tuple[Tensor, Tensor]:
        """Return the tables as integers of `config.row_bits`, or of 8 bits, int8 [T, R, d_out], and scales [T, R]."""
        if self.row_scale is not None:
            return self.tables, self.row_scale
        return integer_rows(self.tables.detach(), self.config.row_bits or 8)

    def rows_as(self, storage: str) -> tuple[Tensor, Tensor | None]:
        """Return rows and scales as tables of "fp32", "bf16" or "int8" hold them; compressed ones as they are."""
        if self.storage != "fp32":
            return self.tables, self.row_scale
        if storage == "int8":
            return self.integer_rows()
        rows = self.stored_rows().detach()
        return (rows.bfloat16() if storage == "bf16" else rows), None

    def packed_share(self, dtype: str) -> float:
        if dtype != "int8" or self.config.row_bits != 4:
            return 1.0
        rows = self.config.tables * 2**self.config.bits
        whole = 2.0 * (self.cost().parameters - self.tables.numel()) + rows * (self.d_out + 4.0)
        return 1.0 - rows * self.d_out / 2 / whole

    def compute_dtype(self) -> torch.dtype:
        # Compressed tables and fixed signs are buffers, which keep their own dtype when a model is cast.
        return next((p.dtype for p in self.parameters()), self.projection.weight.dtype)

    def cost(self, n_tokens: int = 1) -> Cost:
        config = self.config
        itemsize = self.projection.weight.element_size()
        hashing = self.projection.cost(itemsize)
        row_bytes = self.d_out * self.tables.element_size() + (4 if self.row_scale is not None else 0)
        rows = config.tables * distinct_rows(n_tokens * config.neighbours, 2**config.bits)
        others = [*(self.norm.parameters() if self.norm else ()), *((self.bias,) if self.bias is not None else ())]
        small = sum(p.numel() for p in others)
        stored = self.tables.numel() + (0 if self.row_scale is None else self.row_scale.numel())
        return Cost(
            n_tokens * (hashing.flops + 2.0 * config.tables * config.neighbours * self.d_out),
            rows * row_bytes + (hashing.bytes_read + small * itemsize if n_tokens else 0.0),
            stored + hashing.parameters + small,
        )

    def fit_activations(self, dense: DenseFFN, x_ND: Tensor) -> str:
        """Fit the tables to the dense layer's outputs on x, with the hash as it is (see `fit_tables`)."""
        with torch.no_grad():
            fit_tables(self, x_ND, dense.tokens(x_ND))
        self.fitted = "closed-form"
        return self.fitted

    def output_parameters(self) -> list[nn.Parameter]:
        if self.storage != "fp32":
            raise ConfigError(f"the tables are stored as {self.storage}; decompress() first")
        return [p for p in (*self.table_parameters(), self.bias) if p is not None]

    def table_parameters(self) -> list[nn.Parameter]:
        """Return the tables, an optimiser group of their own."""
        return [self.tables] if isinstance(self.tables, nn.Parameter) else []

    def projection_parameters(self) -> list[nn.Parameter]:
        """Return the projection's weights, an optimiser group of their own."""
        return self.projection.weights()

    def row_bytes(self, n_tokens: int) -> float:
        each = self.d_out * self.tables.element_size()
        return float(n_tokens) * self.config.tables * self.config.neighbours * each

    def computes_in(self, dtype: str) -> str:
        return "fp32" if dtype == "fp32" else "int16"

    def start_from_mean(self, mean_D: Tensor) -> None:
        with torch.no_grad():
            self.tables.zero_()
            if self.bias is not None:
                self.bias.copy_(mean_D)

    def solve(self, x_ND: Tensor, y_ND: Tensor) -> float:
        return fit_tables(self, x_ND, y_ND)

    @property
    def storage(self) -> str:  # type: ignore[override]
        return self.config.storage

    def rounded(self, dtype: str) -> LookupFFN:
        twin = copy.deepcopy(self)
        if dtype == "fp32":
            return twin
        if twin.storage == "fp32":
            twin.compress(dtype)
        scale = twin.row_scale
        twin.to(torch.bfloat16)
        twin.row_scale = scale  # scales stay float32 when packed
        return twin

    def compress(self, tables: str = "int8") -> LookupFFN:
        """Store the tables as bf16, or as int8 with a scale per row, in place; for evaluation only.

        Raises:
            ConfigError: `tables` is neither, or the layer is compressed already.
        """
        check_choice("compress", "tables", tables, ("bf16", "int8"))
        if self.config.storage != "fp32":
            raise ConfigError(f"compress: the tables are stored as {self.config.storage} already; decompress() first")
        rows, scale = self.rows_as(tables)
        self.config = dataclasses.replace(self.config, storage=tables)
        del self.tables
        self._store_compressed(rows, scale)
        return self

    def decompress(self) -> LookupFFN:
        """Turn compressed tables back into a trainable parameter, in place (what was rounded stays rounded)."""
        if self.config.storage == "fp32":
            return self
        wide = self.tables.to(self.compute_dtype())
        if self.row_scale is not None:
            wide = wide * self.row_scale.unsqueeze(-1).to(wide.dtype)
        self.config = dataclasses.replace(self.config, storage="fp32")
        del self.tables, self.row_scale
        self.tables = nn.Parameter(wide)
        self.register_buffer("row_scale", None)
        return self

    def _store_compressed(self, rows: Tensor, scale: Tensor | None) -> None:
        self._buffers.pop("row_scale", None)
        self.register_buffer("tables", rows)
        self.register_buffer("row_scale", scale)


_STORAGE = {"bf16": torch.bfloat16, "int8": torch.int8}


def _unit_scale(config: LookupConfig) -> Tensor | None:
    return torch.ones(config.tables, 2**config.bits) if config.storage == "int8" else None


def rows_of(codes_NTF: Tensor, bits: int) -> Tensor:
    """Number the rows of all tables, int32 [N, T F]: row `code` of table t is t R + code."""
    first_T1 = torch.arange(codes_NTF.shape[1], dtype=codes_NTF.dtype).unsqueeze(-1) << bits
    return (codes_NTF + first_T1).flatten(1)


@cache
def score_energy(bits: int, neighbours: int, gelu: bool) -> float:
    """Estimate E[sum_f score_f^2] for standard normal z, from a fixed sample of 4,096 draws."""
    sample: Callable[..., tuple[Tensor, Tensor]] = hash_codes_reference
    with torch.device("cpu"):  # also while transformers builds a model on the meta device
        generator = torch.Generator().manual_seed(bits)
        z = torch.randn(4096, bits, generator=generator, dtype=torch.float64)
        return sample(z, bits, min(neighbours, 64), gelu)[1].square().sum(-1).mean().item()
