"""torch as it comes: fp32, bf16, and int8 weights with activations quantised on the fly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nogemm.bench.peers._base import Engine, Inputs, Runner


class EagerRunner(Runner):
    """Call a module under inference mode, floating inputs cast to its dtype beforehand."""

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.module, self.dtype = module, dtype

    def prepare(self, inputs: Inputs) -> Any:
        """Cast floating inputs: a bf16 model gets a bf16 stream, as it would between its layers."""
        return tuple(x.to(self.dtype) if x.is_floating_point() else x for x in inputs)

    def run(self, prepared: Any) -> Any:
        with torch.inference_mode():
            return self.module(*prepared)


class TorchEngine(Engine):
    """Cast the module and call it."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def compile(self, module: nn.Module, example: Inputs, calibration: Sequence[Inputs]) -> Runner:
        if self.precision == "int8":
            return EagerRunner(quantised(module))
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[self.precision]
        return EagerRunner(copy.deepcopy(module).to(dtype).eval(), dtype)


def quantised(module: nn.Module) -> nn.Module:
    """Quantise every Linear's weight to int8, activations dynamically."""
    with warnings.catch_warnings():
        # torch announces that torchao will take this over one day; it is the fastest eager path today.
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(copy.deepcopy(module).eval(), {nn.Linear}, dtype=torch.qint8)


def make(precision: str) -> Engine:
    """Make the eager engine for "fp32", "bf16" or "int8"."""
    return TorchEngine(precision)
