"""The worker's side of `nogemm profile`: our layer whole and by phases, with hardware counters where there are some.

The module's call is timed as everywhere. A phase is one native call (csrc/packed/host/phases.h) with a clock of its own
around it, so neither Python nor the dispatcher is in it: the whole kernel, or the kernel stopped after its first phase.
Nothing in the kernels reads a clock. Layers of several operators are taken apart by torch's profiler instead.

Legend: N tokens, D width.
Reading order: `CallContender`, `PhaseContender`, `SketchContender`, `operator_times`.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import time
from collections import defaultdict
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from nogemm.bench.contenders.layer import DenseContender, OurContender
from nogemm.bench.engine.measure import summary
from nogemm.bench.engine.worker import Contender
from nogemm.errors import NativeError
from nogemm.hardware.counters import HARDWARE_EVENTS, Counters
from nogemm.ops._library import native

WHOLE, FIRST = 0, 1
_COUNTED_CALLS = 24
_PROFILED_SECONDS = 1.0
_SMALL = 0.01  # of all operators' time: those that take less are one row
_CALL = "nogemm profiled call"


def count_events(contender: Contender, layers: int) -> dict[str, float]:
    """Count hardware events of calls on fresh input; per call of one layer."""
    inputs = [contender.draw() for _ in range(_COUNTED_CALLS)]
    counters = Counters(HARDWARE_EVENTS)
    try:
        counters.start()
        for one in inputs:
            contender.run(one)
        found = counters.stop()
    finally:
        counters.close()
    return {name: count / (_COUNTED_CALLS * layers) for name, count in found.items()}


def with_events(contender: OurContender | DenseContender, facts: dict[str, Any]) -> dict[str, Any]:
    """Add a prepared contender's events to its facts, if they were asked for."""
    return facts | ({"events": count_events(contender, contender.copies)} if contender.settings["events"] else {})


class _Ours(OurContender):
    """A packed layer, verified as in `bench layer`; a profile does not show its flip rate, which takes seconds."""

    def _flips(self, x_ND: Tensor) -> dict[str, Any]:
        return {}


class CallContender(_Ours):
    """The packed module's call, as `bench layer` times it, and its operators if it is not one native call."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        facts = super().prepare(case)
        if facts["verified"] and self.packed[0].kernel is None:
            facts |= {"operators": {name: summary(us) for name, us in operator_times(self, self.copies).items()}}
        return with_events(self, facts)


class CountedDense(DenseContender):
    """A dense contender, with its events."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        return with_events(self, super().prepare(case))


class PhaseContender(_Ours):
    """The native kernel alone, whole or its first phase; settings["phase"] says which."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.phase: int = settings["phase"]
        self.kind = 0
        self.outputs: list[Tensor] = []
        self._seconds = native().nogemm_phase_seconds
        self._seconds.restype = ctypes.c_double
        self._seconds.argtypes = [*[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 3, ctypes.c_int64]

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.outputs = []
        facts = super().prepare(case)
        known = self.packed[0].kernel
        if known is None:
            raise NativeError(f"{type(self.packed[0]).__name__} is not one native call")
        self.kind = known.number
        self.outputs = [torch.zeros(self.batch, layer.d_out) for layer in self._layers()]
        if facts["verified"]:
            facts |= self._same_as_module()
        return with_events(self, facts)

    def run(self, inputs: Any) -> Any:
        # The base class verifies the module through `run`; only afterwards are there outputs to write into.
        if not self.outputs:
            return super().run(inputs)
        self.timed(inputs)
        return self.outputs

    def timed(self, inputs: Any) -> float:
        """Return the seconds of one phase in all copies."""
        total = 0.0
        for layer, x, y in zip(self._layers(), inputs, self.outputs, strict=True):
            packed = layer.get_buffer("packed").data_ptr()
            seconds = self._seconds(self.kind, self.phase, packed, x.data_ptr(), y.data_ptr(), self.batch)
            if seconds < 0:
                raise NativeError("no memory for the kernel's scratch")
            total += seconds
        return total

    def _layers(self) -> list[Any]:
        return list(self.packed)

    def _same_as_module(self) -> dict[str, Any]:
        """Refuse to time an entry that does not compute what the module computes, to the bit."""
        if self.phase != WHOLE:
            return {}
        tokens = self._tokens()
        self.timed(tokens)
        expected = super().run(tokens)
        if all(torch.equal(a, b) for a, b in zip(self.outputs, expected, strict=True)):
            return {}
        return {"verified": False, "error": "the native entry does not match the module"}


class SketchContender(_Ours):
    """A HireFFN's first phase, as the operator that names the candidates: its kernel cannot be stopped after it."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.verifying = True
        facts = super().prepare(case)
        self.verifying = False
        if facts["verified"] and not self._holds_all_that_answer():
            facts |= {"verified": False, "error": "neurons answer that are not among the candidates"}
        return with_events(self, facts)

    def run(self, inputs: Any) -> Any:
        return super().run(inputs) if self.verifying else self._chosen(inputs, kept=False)

    def _chosen(self, inputs: Any, *, kept: bool) -> list[Tensor]:
        with torch.inference_mode():
            return [layer.chosen_neurons(x, kept=kept) for layer, x in zip(self.packed, inputs, strict=True)]

    def _holds_all_that_answer(self) -> bool:
        tokens = self._tokens()
        pairs = zip(self._chosen(tokens, kept=True), self._chosen(tokens, kept=False), strict=True)
        return all(bool((~answering | candidate).all()) for answering, candidate in pairs)


def operator_times(contender: Contender, layers: int) -> dict[str, list[float]]:
    """Time the operators of calls on fresh input by torch's profiler.

    Returns:
        {"op:NAME": us per layer, a number for each call}: time in the operator itself, not in those that it calls, with
        the profiler's own for each. The smallest, together, are "op:others".
    """
    start = time.perf_counter()
    contender.run(contender.draw())
    once = time.perf_counter() - start
    calls = max(3, min(_COUNTED_CALLS, int(_PROFILED_SECONDS / once)))
    inputs = [contender.draw() for _ in range(1 + calls)]
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for one in inputs:
            with record_function(_CALL):
                contender.run(one)
    events = profiler.events() or []
    marks = sorted((event for event in events if event.name == _CALL), key=lambda event: event.time_range.start)
    starts = [mark.time_range.start for mark in marks]
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(marks))
    for event in events:
        # An operator that others start in threads of the pool runs while its caller's clock does.
        at = bisect.bisect_right(starts, event.time_range.start) - 1
        if at >= 0 and event.name != _CALL and event.thread == marks[0].thread:
            found[f"op:{event.name}"][at] += event.self_cpu_time_total / layers
    # The profiler sets itself up in the first call.
    return join_small({name: us[1:] for name, us in found.items()})


def join_small(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Order operators by their median, the longest first, and add up those that take less than a hundredth of all."""
    usual = {name: median(us) for name, us in times.items()}
    least = _SMALL * sum(usual.values())
    kept = {name: times[name] for name in sorted(times, key=lambda name: -usual[name]) if usual[name] >= least}
    small = [us for name, us in times.items() if name not in kept]
    if small:
        kept["op:others"] = [math.fsum(us) for us in zip(*small, strict=True)]
    return kept
