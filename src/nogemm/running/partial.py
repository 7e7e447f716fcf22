"""Results that outlive an interruption: written as they grow, marked as partial until their command has ended.

A measuring function calls `keep` with the result so far; `Record` writes it. A command that is stopped leaves
{"partial": true, "reason": why} beside what was measured; one that is killed leaves the last state, at most some
seconds old. SIGTERM, which time limits send, interrupts as Ctrl-C does.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from nogemm.files import write_json

Keep = Callable[[dict[str, Any]], None]
RUNNING = "its command had not ended when this was written"
_SECONDS = 10.0


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: a time limit, or somebody's `kill`."""


class Record:
    """Write a result to a file while it grows.

    Args:
        path: of the file; None: nothing is written.
        kind: of the result.
        seconds: two writes of an unfinished result are at least so far apart.
    """

    def __init__(self, path: Path | None, kind: str | None = None, *, seconds: float = _SECONDS) -> None:
        self.path = path
        self.start = time.monotonic()
        self.result: dict[str, Any] | None = None
        self._head = {} if kind is None else {"kind": kind}
        self._seconds = seconds
        self._next = 0.0

    def keep(self, result: dict[str, Any]) -> None:
        """Remember the result so far; write it as partial, unless that was done a moment ago."""
        self.result = result
        if time.monotonic() >= self._next:
            self._write(self._marked(RUNNING))
            self._next = time.monotonic() + self._seconds

    def stopped(self, error: BaseException) -> dict[str, Any] | None:
        """Write what was kept with the reason why it ends there, and return it; None: nothing had been kept."""
        if self.result is None:
            return None
        found = self._marked(self.reason(error))
        self._write(found)
        return found

    def done(self, result: dict[str, Any]) -> None:
        """Write the whole result."""
        self._write(self._head | result)

    def reason(self, error: BaseException) -> str:
        """Say what ended the command, and after how long."""
        if isinstance(error, Terminated):
            cause = "stopped by SIGTERM"
        elif isinstance(error, KeyboardInterrupt):
            cause = str(error) or "stopped by Ctrl-C"  # training says how to go on
        else:
            cause = f"failed ({type(error).__name__}: {' '.join(str(error).split())})"
        return f"{cause} (after {time.monotonic() - self.start:.0f} s)"

    def _marked(self, reason: str) -> dict[str, Any]:
        return self._head | (self.result or {}) | {"partial": True, "reason": reason}

    def _write(self, result: dict[str, Any]) -> None:
        if self.path is not None:
            write_json(self.path, result)


def exit_code(stop: KeyboardInterrupt) -> int:
    """Return the code that a shell expects of a command that a signal ended."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the main thread, so that what Ctrl-C cleans up is cleaned up then, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: FrameType | None) -> None:
        raise Terminated("SIGTERM")

    old = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
