"""torch.compile with frozen weights, fp32 and bf16."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nogemm.bench.peers._base import Engine, Inputs, Runner
from nogemm.bench.peers.eager import EagerRunner


class InductorRunner(EagerRunner):
    """Call the compiled module without gradients (freezing folds weights only then)."""

    def run(self, prepared: Any) -> Any:
        with torch.no_grad():
            return self.module(*prepared)


class InductorEngine(Engine):
    """Compile for the example's very shape, which is inductor's fastest way."""

    static = True

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def compile(self, module: nn.Module, example: Inputs, calibration: Sequence[Inputs]) -> Runner:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]
        return compile_frozen(copy.deepcopy(module).to(dtype).eval(), example, dtype)


def compile_frozen(module: nn.Module, example: Inputs, dtype: torch.dtype = torch.float32) -> Runner:
    """Compile a module for the example's shape with its weights as constants, and call it once."""
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch._dynamo.reset()
    compiled: Any = torch.compile(module, dynamic=False)
    runner = InductorRunner(compiled, dtype)
    runner.run(runner.prepare(example))
    return runner


def make(precision: str) -> Engine:
    """Make the inductor engine for "fp32" or "bf16"."""
    return InductorEngine(precision)
