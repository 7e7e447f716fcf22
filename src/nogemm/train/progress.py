"""Show progress: a bar on a terminal, log lines elsewhere. The library itself never prints."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

import torch

from nogemm.hardware.load import BUSY, Others
from nogemm.hardware.waiting import advice

logger = logging.getLogger("nogemm.train")


class Progress:
    """Progress of one run: loss, tokens per second, time left.

    With `bar=None` a bar is shown when standard error is a terminal and rich is installed; log lines (level INFO of the
    logger `nogemm.train`) are written every `seconds` otherwise.
    """

    def __init__(self, seconds: float, bar: bool | None = None) -> None:
        self.seconds = seconds
        self._bar = _make_bar() if (sys.stderr.isatty() if bar is None else bar) else None
        self._task = None
        self._last = time.monotonic()
        self._start = (time.monotonic(), 0.0, 0)
        self._others: Others | None = None

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("training", total=1.0, loss="", speed="", left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, fraction: float, tokens: int) -> None:
        """Note where this session starts: speed and time left are measured from here."""
        self._start = (time.monotonic(), fraction, tokens)
        self._others = Others()

    def update(self, stage: str, fraction: float, tokens: int, loss: float, extra: str = "") -> None:
        """Show the state after a step; `fraction` is the part of the whole budget that is used up."""
        now = time.monotonic()
        start, first, before = self._start
        elapsed = max(now - start, 1e-6)
        speed = (tokens - before) / elapsed
        left = elapsed * (1.0 - fraction) / max(fraction - first, 1e-6)
        if self._others is not None and elapsed >= self.seconds:
            self._warn_once(self._others)
        if self._bar is not None and self._task is not None:
            self._bar.update(
                self._task,
                completed=fraction,
                description=stage,
                loss=f"loss {loss:.4f}",
                speed=f"{speed:,.0f} tokens/s",
                left=f"{clock(left)} left",
            )
        elif now - self._last >= self.seconds or fraction >= 1.0:
            self._last = now
            logger.info(
                "%s: %.0f%% loss %.4f, %s tokens, %.0f tokens/s, %s left%s",
                stage, 100 * fraction, loss, f"{tokens:,}", speed, clock(left), extra,
            )  # fmt: skip

    def _warn_once(self, others: Others) -> None:
        """Say what helps where other processes work beside threads that spin while they wait."""
        self._others = None
        used, said = others.cores(), advice()
        if said and used is not None and used > BUSY and torch.get_num_threads() > 1:
            logger.warning("other processes use %.1f cores. %s", used, said)


def clock(seconds: float) -> str:
    """Write a duration as minutes:seconds, or hours:minutes:seconds."""
    whole = int(min(seconds, 359_999))
    hours, rest = divmod(whole, 3600)
    text = f"{rest // 60:02d}:{rest % 60:02d}"
    return f"{hours}:{text}" if hours else text


def _make_bar():
    try:
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar
    except ImportError:
        return None
    columns = [TextColumn("{task.fields[" + name + "]}") for name in ("loss", "speed", "left")]
    return Bar(TextColumn("{task.description}"), BarColumn(), *columns, transient=False)
