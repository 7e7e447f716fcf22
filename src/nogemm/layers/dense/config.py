"""The choices of a dense FFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nogemm.activations import ActivationName
from nogemm.config import LayerConfig, check_int, register

if TYPE_CHECKING:
    from nogemm.layers.dense.layer import DenseFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class DenseConfig(LayerConfig["DenseFFN"]):
    """A dense FFN of width `hidden` (None: the width of the layer that is replaced)."""

    kind: ClassVar[str] = "dense"
    hidden: int | None = None
    activation: ActivationName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden is not None:
            check_int("DenseConfig", "hidden", self.hidden, 1)
