"""The process a contender lives in: `python -m nogemm.bench.engine.worker`, spoken to by `worker_process`.

First line in: {"factory", "settings", "threads"}; then {"do": "prepare", "case"} or {"do": "time", "seconds",
"max_calls"}, one answer line each; end of input ends the process. What libraries print goes to the log.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import re
import sys
import time
from typing import Any, Protocol, runtime_checkable

LEAD_IN_SECONDS = 0.05


class Contender(Protocol):
    """What a factory returns."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        """Build for a case and compare with the reference.

        Returns:
            facts for the row; "verified" must be true for the case to be timed. "layers" (default 1) is how many
            layers one `run` passes through: times are given per layer.
        """
        ...

    def draw(self) -> Any:
        """Return the next input; not timed."""
        ...

    def run(self, inputs: Any) -> Any:
        """Compute; timed."""
        ...


@runtime_checkable
class SelfTimed(Protocol):
    """A contender that keeps the clock itself, where Python's would be part of what it measures."""

    def timed(self, inputs: Any) -> float:
        """Compute, and return the seconds that it took."""
        ...


def time_calls(contender: Contender, seconds: float, max_calls: int, layers: int) -> list[float]:
    """Time calls for about `seconds`: microseconds per layer, one number per call, at least one."""
    once = _once(contender)
    if once < LEAD_IN_SECONDS:
        # Waking up after the others' turns is not the engine's doing: a short call leads in, untimed.
        once = _once(contender)
        count = max(1, min(max_calls, int(seconds / max(once, 1e-7))))
        times = [_once(contender) for _ in range(count)]
    else:
        times = [once]
    return [1e6 * t / layers for t in times]


def _once(contender: Contender) -> float:
    inputs = contender.draw()
    if isinstance(contender, SelfTimed):
        return contender.timed(inputs)
    start = time.perf_counter_ns()
    outputs = contender.run(inputs)
    elapsed = time.perf_counter_ns() - start
    del outputs  # freed outside the clock
    return 1e-9 * elapsed


class _Server:
    def __init__(self, first: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(first["threads"])
        module, _, name = first["factory"].partition(":")
        self.contender: Contender = getattr(importlib.import_module(module), name)(first["settings"])
        self.layers = 1

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["do"] == "prepare":
            gc.enable()
            gc.collect()
            facts = self.contender.prepare(message["case"])
            self.layers = facts.get("layers", 1)
            gc.disable()
            return facts
        return {"us": time_calls(self.contender, message["seconds"], message["max_calls"], self.layers)}


def _one_line(error: Exception) -> str:
    """Say an exception in one line: exporters send pages with colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
    return " ".join(text.split())[:400]


def main() -> None:
    """Serve one parent until it closes the pipe."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not reach the parent's pipe
    server: _Server | None = None
    failed = ""
    for number, line in enumerate(sys.stdin):
        message = json.loads(line)
        if number == 0:
            try:
                server = _Server(message)
            except Exception as error:
                failed = _one_line(error)
            continue
        try:
            answer = server.answer(message) if server is not None else {"error": failed}
        except Exception as error:
            answer = {"error": _one_line(error)}
        channel.write(json.dumps(answer) + "\n")
        channel.flush()


if __name__ == "__main__":
    main()
