"""No FFN has nothing to choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from nogemm.config import LayerConfig, register

if TYPE_CHECKING:
    from nogemm.layers.no.layer import NoFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class NoConfig(LayerConfig["NoFFN"]):
    """No FFN: a constant output, zero until fitted (the floor that every method must clear)."""

    kind: ClassVar[str] = "no"
