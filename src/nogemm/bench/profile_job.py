"""The worker's side of `nogemm profile`: our layer whole and by phases, with hardware counters where there are some.

The module's call is timed as everywhere. A phase is one native call (csrc/phases.h) with a clock of its own around it,
so neither Python nor the dispatcher is in it: the whole kernel, or the kernel stopped after its first phase. Nothing
in the kernels reads a clock.

Legend: N tokens, D width.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.bench.layer_job import DenseContender, OurContender
from nogemm.bench.worker import Contender
from nogemm.errors import NativeError
from nogemm.hardware.counters import HARDWARE_EVENTS, Counters
from nogemm.layers.hire_packed import PackedHire
from nogemm.layers.lookup_packed import PackedLookup
from nogemm.layers.tree_packed import PackedTree
from nogemm.ops._library import native

WHOLE, FIRST = 0, 1
# kind of csrc/phases.h, and what its two phases are called; a kind with one phase has no names
KINDS: dict[type[nn.Module], tuple[int, tuple[str, str] | None]] = {
    PackedLookup: (0, ("hash", "gather")),
    PackedTree: (1, ("descent", "sum")),
    PackedHire: (2, None),
}
_COUNTED_CALLS = 24


def kind_of(packed: nn.Module) -> tuple[int, tuple[str, str] | None] | None:
    """Return a packed layer's kind and the names of its phases; None if it is not one native call."""
    if not getattr(packed, "native", False):
        return None
    return KINDS.get(type(packed))


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


class RowsContender(OurContender):
    """A packed layer that answers in its one native call, whatever else would be quicker."""

    def _pack(self) -> nn.Module:
        return self.layer.pack(self.settings["dtype"], "rows")


class CallContender(RowsContender):
    """The packed module's call, as `bench layer` times it."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        return with_events(self, super().prepare(case))


class CountedDense(DenseContender):
    """A dense contender, with its events."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        return with_events(self, super().prepare(case))


class PhaseContender(RowsContender):
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
        known = kind_of(self.packed[0])
        if known is None:
            raise NativeError(f"{type(self.packed[0]).__name__} is not one native call")
        self.kind = known[0]
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
