"""The choices of a SLIDE layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nogemm.config import register
from nogemm.layers.hashed.config import HashedConfig

if TYPE_CHECKING:
    from nogemm.layers.slide.layer import SlideFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class SlideConfig(HashedConfig["SlideFFN"]):
    """Describes a SLIDE layer.

    Attributes:
        bits, tables, chunk, hidden, activation, norm, projection: see `HashedConfig`.
        faithful: as published: the same signs in every layer, a dropout of its own in training, the published start.
    """

    kind: ClassVar[str] = "slide"
