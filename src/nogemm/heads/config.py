"""The choices of a vocabulary head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from nogemm.config import Config, check_int, register
from nogemm.errors import ConfigError

HeadMode = Literal["exact", "deferred", "high_recall", "fast"]


@register
@dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    """Describes how the head of a decoder or of a masked language model finds its tokens.

    Attributes:
        mode: "exact": every token is proven to be the dense head's as it is chosen.
            "deferred": tokens are searched for, and proven `verify_every` at a time; from the first one that differs,
            `nogemm.generate` starts again. The text is the dense model's.
            "high_recall": tokens are searched for; `rows` is chosen so that the share `recall` of them is the dense
            head's on the data that `nogemm.convert_head` is given.
            "fast": tokens are searched for among `rows` rows.
        verify_every: tokens between two proofs of "deferred".
        recall: of "high_recall", above 0, at most 1.
        rows: that a search computes exactly; None: a 48th of the vocabulary, 512 to 2,048 of them. A token that the
            search misses costs mode "deferred" all that was decoded behind it, so a few more rows pay.
        leading: coordinates of a row that get eight bits, rounded up to a multiple of four; the others have four.
        sketch: coordinates that a search reads, the leading ones among them.
    """

    family: ClassVar[str] = "head"
    kind: ClassVar[str] = "vocabulary"
    mode: HeadMode = "exact"
    verify_every: int = 16
    recall: float = 0.999
    rows: int | None = None
    leading: int = 32
    sketch: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("HeadConfig", "verify_every", self.verify_every, 1)
        if self.rows is not None:
            check_int("HeadConfig", "rows", self.rows, 1)
        check_int("HeadConfig", "leading", self.leading, 0)
        check_int("HeadConfig", "sketch", self.sketch, 1)
        if not 0 < self.recall <= 1:
            raise ConfigError(f"HeadConfig: recall must be above 0 and at most 1, got {self.recall!r}")

    def rows_of(self, vocabulary: int) -> int:
        """Return how many rows of a head of so many a search computes exactly."""
        rows = min(2048, max(512, vocabulary // 48)) if self.rows is None else self.rows
        return min(rows, vocabulary)

    @property
    def approximate(self) -> bool:
        """Whether tokens may be others than the dense head's."""
        return self.mode in ("high_recall", "fast")
