"""Progress on standard error: in place on a terminal, as plain lines elsewhere.

Elsewhere a line is printed at most every few seconds, and at least every thirty: a step that takes long repeats its
line with the seconds it has taken so far. A command that ends at once prints none. Commands alone use this: a function
of the library takes a `note` to call instead.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

EVERY, SILENCE = 5.0, 30.0  # training has a line every 20 seconds, which needs no repetition


class Progress:
    """Show what a command is doing.

    Args:
        stream: where to; None: standard error as it is at each line.
        every: plain lines are at least so many seconds apart.
        silence: after so many seconds without a line the last one is repeated, with the time it has taken.
    """

    def __init__(self, stream: TextIO | None = None, *, every: float = EVERY, silence: float = SILENCE) -> None:
        self.every, self.silence = every, silence
        self._stream = stream
        self._lock = threading.Lock()
        self._line = ""
        self._pending = False
        self._begun = self._shown = time.monotonic()
        self._ended = threading.Event()

    def __call__(self, line: str) -> None:
        """Show a line: at once on a terminal, elsewhere when the last one is old enough."""
        with self._lock:
            self._line, self._pending, self._begun = line, True, time.monotonic()
            if self.terminal() or self._due():
                self._show("")

    def clear(self) -> None:
        """Forget the line, and remove it from a terminal."""
        with self._lock:
            if self._line and self.terminal():
                print("\r\033[K", end="", file=self._out(), flush=True)
            self._line, self._pending = "", False

    @contextmanager
    def watching(self) -> Iterator[Progress]:
        """Repeat the line of a step that takes long, until the block ends; the line is then cleared."""
        self._ended.clear()
        self._shown = time.monotonic()
        thread = threading.Thread(target=self._watch, name="nogemm progress", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            thread.join()
            self.clear()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.every / 2)):
            with self._lock:
                if not self._line:
                    continue
                if self._pending and self._due():
                    self._show("")
                elif time.monotonic() - self._shown >= self.silence:
                    self._show(f" ({time.monotonic() - self._begun:.0f} s so far)")

    def _due(self) -> bool:
        return time.monotonic() - self._shown >= self.every

    def _show(self, tail: str) -> None:
        form = "\r\033[K{}" if self.terminal() else "{}\n"
        print(form.format(self._line + tail), end="", file=self._out(), flush=True)
        self._shown, self._pending = time.monotonic(), False

    def _out(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream

    def terminal(self) -> bool:
        """Say whether lines are shown in place."""
        return self._out().isatty()


progress = Progress()


@contextmanager
def training_lines(to: Progress = progress) -> Iterator[None]:
    """Show what training logs as lines of progress; on a terminal it has its bar instead."""
    if to.terminal():
        to.clear()
        yield
        return

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            to(record.getMessage())

    logger, handler = logging.getLogger("nogemm.train"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        to("training: reading texts")
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
