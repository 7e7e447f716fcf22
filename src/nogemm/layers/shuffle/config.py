"""The choices of a channel-shuffle layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nogemm.activations import ActivationName
from nogemm.config import LayerConfig, check_int, register

if TYPE_CHECKING:
    from nogemm.layers.shuffle.layer import ShuffleFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class ShuffleConfig(LayerConfig["ShuffleFFN"]):
    """Describes a channel-shuffle layer.

    Attributes:
        block: B, input channels of a group.
        hidden: F (None: that of the layer that is replaced).
        activation: None: that of the layer that is replaced.
        norm: LayerNorm inside the layer.
        norm_eps: added to its variance.
        faithful: as in the published baseline: no norm, GELU, and widths that must divide.
    """

    kind: ClassVar[str] = "shuffle"
    block: int = 64
    hidden: int | None = None
    activation: ActivationName | None = None
    norm: bool = True
    norm_eps: float = 1e-5
    faithful: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("ShuffleConfig", "block", self.block, 1)
        if self.hidden is not None:
            check_int("ShuffleConfig", "hidden", self.hidden, 1)
