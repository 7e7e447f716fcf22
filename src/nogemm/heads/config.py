"""The choices of a vocabulary head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nogemm.config import Config, check_choices, check_int, register

HeadMode = Literal["exact"]


@register
@dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    """Describes how the head of a decoder or of a masked language model finds its tokens.

    Attributes:
        mode: "exact": every token is proven to be the argmax of the dense logits as it is chosen.
        leading: coordinates of a row that get eight bits, rounded up to a multiple of four; the others have four.
    """

    family: ClassVar[str] = "head"
    kind: ClassVar[str] = "vocabulary"
    mode: HeadMode = "exact"
    leading: int = 64

    def __post_init__(self) -> None:
        check_choices(self)
        check_int("HeadConfig", "leading", self.leading, 0)
