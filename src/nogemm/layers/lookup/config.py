"""The choices of a LookupFFN."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from nogemm.config import LayerConfig, ProjectionConfig, check_int, register
from nogemm.errors import ConfigError
from nogemm.projections import BHConfig

if TYPE_CHECKING:
    from nogemm.layers.lookup.layer import LookupFFN  # noqa: F401

Score = Literal["gelu", "sigmoid"]
Init = Literal["scaled", "reference"]
Storage = Literal["fp32", "bf16", "int8"]


@register
@dataclass(frozen=True, kw_only=True)
class LookupConfig(LayerConfig["LookupFFN"]):
    """Describes a LookupFFN layer.

    Attributes:
        tables: T, at least 1.
        bits: K, from 1 to 16; each table has 2^K rows.
        projection: how the token becomes T K soft code bits.
        score: "gelu" (linearly scaled) or "sigmoid".
        neighbours: rows read per table, from 1 to 2^K, nearest codes first.
        norm: LayerNorm inside the layer, before the projection.
        norm_eps: added to its variance.
        bias: add a trainable bias to the output.
        init: "scaled" (output scale independent of tables, bits and projection) or "reference" (as published).
        row_bits: 8 or 4: the tables' rows are rounded to integers of so many bits with a scale per row, in training
            too, where gradients pass straight through the rounding; packed in "int8" they take as many bits and lose
            nothing more. None: rows are rounded when they are packed, to 8 bits.
        storage: how the tables are kept: "fp32" (trainable, in the layer's dtype), or compressed "bf16" or "int8"
            (a scale per row), which `compress` and `decompress` change.
    """

    kind: ClassVar[str] = "lookup"
    tables: int = 128
    bits: int = 8
    projection: ProjectionConfig = dataclasses.field(default_factory=BHConfig)
    score: Score = "gelu"
    neighbours: int = 1
    norm: bool = True
    norm_eps: float = 1e-5
    bias: bool = True
    init: Init = "scaled"
    row_bits: int | None = None
    storage: Storage = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("LookupConfig", "tables", self.tables, 1)
        check_int("LookupConfig", "bits", self.bits, 1, 16)
        check_int("LookupConfig", "neighbours", self.neighbours, 1, 2**self.bits)
        if self.row_bits is not None and (type(self.row_bits) is not int or self.row_bits not in (4, 8)):
            raise ConfigError(f"LookupConfig: row_bits must be 8, 4 or none, got row_bits={self.row_bits!r}")
        if self.norm_eps < 0:
            raise ConfigError(f"LookupConfig: norm_eps must be at least 0, got norm_eps={self.norm_eps!r}")
        if not isinstance(self.projection, ProjectionConfig):
            raise ConfigError(f"LookupConfig: projection must be a projection config, got {self.projection!r}")
