"""What a conversion changed: one line per site and a total."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from nogemm.config import LayerConfig
from nogemm.convert.discover import Refusal, in_words
from nogemm.cost import Cost
from nogemm.shape import FFNShape


@dataclass(frozen=True)
class SiteReport:
    """One converted site.

    Attributes:
        name: path of the site in the model.
        config: what it holds now.
        replaced: the dense FFN that was there.
        before, after: cost for one token.
        fitted: "exact", "closed-form" or "random".
    """

    name: str
    config: LayerConfig
    replaced: FFNShape
    before: Cost
    after: Cost
    fitted: str

    @property
    def parameters_before(self) -> int:
        """Stored numbers of the dense FFN."""
        return self.before.parameters

    @property
    def parameters_after(self) -> int:
        """Stored numbers of the layer in its place."""
        return self.after.parameters

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return {
            "name": self.name,
            "config": self.config.to_dict(),
            "replaced": asdict(self.replaced) | {"d_model": self.replaced.d_in},  # as readers of 0.1 know it
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "fitted": self.fitted,
        }


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` did; `print(report)` shows a table.

    Attributes:
        sites: one entry per converted site, in model order.
        refused: what looks like an FFN and was left dense because it cannot be converted, with the reason.
        slower: what was left dense because the layer in its place would be slower here, with both times.
        timing_seconds: that it took to find that out; 0 where nothing was timed.
    """

    sites: tuple[SiteReport, ...]
    refused: tuple[Refusal, ...] = ()
    slower: tuple[Refusal, ...] = ()
    timing_seconds: float = 0.0

    @property
    def before(self) -> Cost:
        """Cost of all converted FFNs before, for one token."""
        return sum((site.before for site in self.sites), Cost(0.0, 0.0, 0))

    @property
    def after(self) -> Cost:
        """Cost of all converted FFNs after, for one token."""
        return sum((site.after for site in self.sites), Cost(0.0, 0.0, 0))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict: lists "sites", "refused" and "slower", costs "before" and "after", the seconds."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "refused": [asdict(refusal) for refusal in self.refused],
            "slower": [asdict(refusal) for refusal in self.slower],
            "timing_seconds": self.timing_seconds,
        }

    def __str__(self) -> str:
        head = ("site", "layer", "kFLOP/token", "KiB read/token", "parameters", "fitted")
        rows = [_row(s.name, s.config.kind, s.before, s.after, s.fitted) for s in self.sites]
        rows.append(_row("total", "", self.before, self.after, ""))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = []
        for row in (head, *rows):
            cells = [
                text.ljust(w) if i in (0, 1, 5) else text.rjust(w)
                for i, (text, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        lines += [f"left dense: {words}" for words in in_words(self.refused)]
        lines += [f"left dense, as it is faster: {words}" for words in in_words(self.slower)]
        if self.timing_seconds:
            lines.append(f"timed beside the dense FFNs: {self.timing_seconds:.1f} s")
        return "\n".join(lines)


def _row(name: str, kind: str, before: Cost, after: Cost, fitted: str) -> tuple[str, ...]:
    return (
        name,
        kind,
        f"{before.flops / 1e3:,.1f} -> {after.flops / 1e3:,.1f}",
        f"{before.bytes_read / 1024:,.1f} -> {after.bytes_read / 1024:,.1f}",
        f"{before.parameters:,} -> {after.parameters:,}",
        fitted,
    )
