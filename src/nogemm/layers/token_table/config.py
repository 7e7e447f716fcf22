"""The choices of a token table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from nogemm.config import LayerConfig, check_int, register
from nogemm.errors import ConfigError

if TYPE_CHECKING:
    from nogemm.layers.token_table.layer import TokenTableFFN  # noqa: F401

Start = Literal["mean", "zero", "alone"]


@register
@dataclass(frozen=True, kw_only=True)
class TokenTableConfig(LayerConfig["TokenTableFFN"]):
    """Describes a token table: a layer that answers a token by the row of its id.

    Attributes:
        vocabulary: V, rows; None: as many as the model's token embedding has.
        start: "mean": with texts, each row is the mean of what the row should answer to its token there, drawn to the
            mean over all tokens; without texts, zero. "zero": zero. "alone": what it should answer to the token where
            that is the model's whole input; needs no texts.
        prior: of "mean": how many tokens the mean over all tokens counts for, at least 0.
        bits: of a packed row's numbers in dtype "int8", 8 or 4; a row has one scale.
    """

    kind: ClassVar[str] = "token_table"
    vocabulary: int | None = None
    start: Start = "mean"
    prior: float = 8.0
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary is not None:
            check_int("TokenTableConfig", "vocabulary", self.vocabulary, 1)
        if self.prior < 0:
            raise ConfigError(f"TokenTableConfig: prior must be at least 0, got prior={self.prior!r}")
        if self.bits not in (4, 8) or isinstance(self.bits, bool):
            raise ConfigError(f"TokenTableConfig: bits must be 8 or 4, got bits={self.bits!r}")

    @property
    def reads_ids(self) -> bool:
        return True

    def for_vocabulary(self, size: int) -> TokenTableConfig:
        return self if self.vocabulary is not None else replace(self, vocabulary=size)
