"""The choices of a MONGOOSE layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nogemm.config import register
from nogemm.errors import ConfigError
from nogemm.layers.hashed.config import HashedConfig

if TYPE_CHECKING:
    from nogemm.layers.mongoose.layer import MongooseFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class MongooseConfig(HashedConfig["MongooseFFN"]):
    """Describes a MONGOOSE layer.

    Attributes:
        bits, tables, chunk, hidden, activation, norm, projection: see `HashedConfig`.
        rebuild: tables are rebuilt in training once this share of the neurons' hash bits has changed; 0: every time.
        triplet_weight: of the loss that teaches the hashes, in every gradient.
        faithful: as published: one start for all layers, tables rebuilt in every forward pass, in evaluation too, pairs
            of the loss drawn at random in each chunk by itself, a dropout of its own in training, the published start.
    """

    kind: ClassVar[str] = "mongoose"
    learned: ClassVar[bool] = True
    rebuild: float = 0.01
    triplet_weight: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rebuild", "triplet_weight"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ConfigError(f"MongooseConfig: {name} must be at least 0, got {name}={value!r}")
