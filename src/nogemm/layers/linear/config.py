"""The choices of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nogemm.config import LayerConfig, check_int, register

if TYPE_CHECKING:
    from nogemm.layers.linear.layer import LinearFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class LinearConfig(LayerConfig["LinearFFN"]):
    """Describes one linear map in an FFN's place: no neurons, no activation.

    Attributes:
        rank: None: one matrix. A number: two thin ones with so many numbers between, which cost
            2 rank (d_model + d_out) FLOP.
    """

    kind: ClassVar[str] = "linear"
    rank: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            check_int("LinearConfig", "rank", self.rank, 1)
