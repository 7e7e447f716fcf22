"""The choices of a sum of layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nogemm.config import LAYERS, SUM, LayerConfig, register
from nogemm.errors import ConfigError

if TYPE_CHECKING:
    from nogemm.layers.sum.layer import SumFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class SumConfig(LayerConfig["SumFFN"]):
    """Describes a sum of layers on the same input.

    Attributes:
        terms: configs of two or more layers, none of them a sum itself. The first starts from the dense FFN, each
            later one from what those before it leave.
    """

    kind: ClassVar[str] = SUM
    terms: tuple[LayerConfig, ...] = dataclasses.field(default=(), metadata=LAYERS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.terms, (list, tuple)) or len(self.terms) < 2:
            raise ConfigError(f"SumConfig: terms must be two layer configs or more, got terms={self.terms!r}")
        for term in self.terms:
            if not isinstance(term, LayerConfig):
                raise ConfigError(f"SumConfig: each of terms must be a layer config, got {term!r}")
            if isinstance(term, SumConfig):
                raise ConfigError("SumConfig: one of terms is a sum itself; write its terms in its place")
        object.__setattr__(self, "terms", tuple(self.terms))  # a list, as JSON has it, could not be hashed

    @property
    def reads_ids(self) -> bool:
        return any(term.reads_ids for term in self.terms)

    def for_vocabulary(self, size: int) -> SumConfig:
        return SumConfig(terms=tuple(term.for_vocabulary(size) for term in self.terms))
