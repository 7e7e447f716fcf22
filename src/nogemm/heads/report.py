"""What a converted head takes in memory, and what of it is shared."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HeadReport:
    """A vocabulary head; `print(report)` says it in a line.

    Attributes:
        mode: see `HeadConfig`.
        rows, width: V and D.
        weight_bytes: of weights and bias.
        tied: whether the weights are the embedding's, so that they take nothing of their own; None: not known.
        codes_bytes: that the codes take beside the weights, once they are made.
        moment_bytes: of the second moment of the states; 0: the codes are fitted to the weights alone.
        search_rows: that a search computes exactly; 0: the mode does not search.
    """

    mode: str
    rows: int
    width: int
    weight_bytes: int
    tied: bool | None
    codes_bytes: int
    moment_bytes: int
    search_rows: int

    @property
    def added_bytes(self) -> int:
        """Bytes that conversion added: codes and moment."""
        return self.codes_bytes + self.moment_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self) | {"added_bytes": self.added_bytes}

    def __str__(self) -> str:
        shared = "" if self.tied is None else ", shared with the embedding" if self.tied else ", a copy of its own"
        fitted = f"a moment of {size(self.moment_bytes)}" if self.moment_bytes else "fitted to the weights alone"
        return (
            f"head {self.rows:,} x {self.width:,}, mode {self.mode}: weights {size(self.weight_bytes)}{shared}; codes "
            f"{size(self.codes_bytes)} beside them, {fitted}"
        )


def size(count: int) -> str:
    """Write bytes in MiB, small ones in KiB."""
    return f"{count / 2**20:,.1f} MiB" if count >= 2**20 else f"{count / 2**10:,.1f} KiB"
