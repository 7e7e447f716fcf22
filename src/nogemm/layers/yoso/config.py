"""The choices of a YOSO layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nogemm.config import (
    OPTIONAL_PROJECTION,
    LayerConfig,
    ProjectionConfig,
    check_int,
    check_projection,
    register,
)
from nogemm.errors import ConfigError

if TYPE_CHECKING:
    from nogemm.layers.yoso.layer import YosoFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class YosoConfig(LayerConfig["YosoFFN"]):
    """Describes a YOSO layer.

    Attributes:
        hashes: T, the number of random hashes; the noise of the sampled output falls as 1 / sqrt(T).
        bits: K, from 1 to 16; more bits make the activation steeper.
        hidden: neurons (None: as many as the layer that is replaced has).
        norm: LayerNorm inside the layer, before hashing.
        norm_eps: added to its variance.
        unit: scale every output to length one, as published.
        gain: a trainable factor per output dimension, for `unit`.
        projection: what hashes, as it is drawn and without its bias, in place of D1 H D2 H D3 H; the expectation then
            holds as far as its outputs are those of random directions. None: D1 H D2 H D3 H.
        faithful: as published: `unit`, fresh random signs in every forward pass, also in evaluation, and a gradient
            through colliding neurons only.
    """

    kind: ClassVar[str] = "yoso"
    hashes: int = 64
    bits: int = 8
    hidden: int | None = None
    norm: bool = True
    norm_eps: float = 1e-5
    unit: bool = False
    gain: bool = False
    projection: ProjectionConfig | None = field(default=None, metadata=OPTIONAL_PROJECTION)
    faithful: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("YosoConfig", "hashes", self.hashes, 1)
        check_int("YosoConfig", "bits", self.bits, 1, 16)
        if self.hidden is not None:
            check_int("YosoConfig", "hidden", self.hidden, 1)
        if self.faithful and self.gain:
            raise ConfigError("YosoConfig: gain=True with faithful=True: the published layer has no gain")
        check_projection("YosoConfig", self.projection, faithful=self.faithful, trained=False)
