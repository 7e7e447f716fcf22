"""The choices of a vocabulary head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nogemm.config import Config, check_choices, check_int, register
from nogemm.errors import ConfigError

HeadMode = Literal["exact", "deferred"]


@register
@dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    """Describes how the head of a decoder or of a masked language model finds its tokens.

    Attributes:
        mode: "exact": every token is proven to be the argmax of the dense logits as it is chosen. "deferred": tokens
            are chosen by a part of the bound, and proven some at a time; a wrong one is taken back.
        verify_every: tokens that "deferred" proves together.
        share: of the bound, by which "deferred" chooses; smaller reads fewer rows, and is wrong more often.
        leading: coordinates of a row that get eight bits; the others have four.
    """

    family: ClassVar[str] = "head"
    kind: ClassVar[str] = "vocabulary"
    mode: HeadMode = "exact"
    verify_every: int = 16
    share: float = 0.4
    leading: int = 64

    def __post_init__(self) -> None:
        check_choices(self)
        check_int("HeadConfig", "verify_every", self.verify_every, 1)
        check_int("HeadConfig", "leading", self.leading, 0)
        if isinstance(self.share, bool) or not isinstance(self.share, (int, float)) or not 0 < self.share <= 1:
            raise ConfigError(f"HeadConfig: share must be above 0 and at most 1, got share={self.share!r}")
