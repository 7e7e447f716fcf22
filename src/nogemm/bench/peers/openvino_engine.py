"""OpenVINO: f32, bf16 (f32 on processors without it), and int8 calibrated by NNCF on sample activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.bench.peers._base import Engine, Inputs, Runner
from nogemm.export.openvino_host import computes_bf16, quantise, quiet, shared_core


class OpenVinoRunner(Runner):
    """Run one inference request; inputs and outputs are shared, not copied.

    Args:
        compiled: the graph.
        free: gives a runner of the graph before its shape was fixed; None: it is not fixed.
    """

    def __init__(self, compiled: Any, free: Callable[[], Runner] | None = None) -> None:
        self.request = compiled.create_infer_request()
        self.free = free

    def any_shape(self) -> Runner:
        return self if self.free is None else self.free()

    def prepare(self, inputs: Inputs) -> Any:
        return {index: x.contiguous().numpy() for index, x in enumerate(inputs)}

    def run(self, prepared: Any) -> Any:
        return self.request.infer(prepared, share_inputs=True, share_outputs=True)

    def result(self, outputs: Any) -> tuple[Tensor, ...]:
        # The arrays are the request's own memory: copy, or the next call changes them.
        return tuple(torch.from_numpy(y.copy()).float() for y in outputs.values())


class OpenVinoEngine(Engine):
    """Convert from torch and compile for latency; `static` fixes the example's shape, OpenVINO's fastest way."""

    def __init__(self, precision: str, static: bool = True) -> None:
        self.precision = "fp32" if precision == "f32" else precision
        self.static = static

    def compile(self, module: nn.Module, example: Inputs, calibration: Sequence[Inputs]) -> Runner:
        import openvino

        with quiet():
            model = openvino.convert_model(module, example_input=example)
        if self.precision == "int8":
            if not calibration:
                raise ValueError("openvino-int8 is calibrated: at least one sample input is needed")
            model = quantise(model, calibration)
        return compiled(model, self.precision, example if self.static else None)


def compiled(model: Any, precision: str, fixed: Inputs | None) -> OpenVinoRunner:
    """Compile a graph for latency on torch's number of threads; `fixed` inputs make their shape the only one."""
    free: Callable[[], Runner] | None = None
    if fixed is not None:
        before = model.clone()
        free = lambda: compiled(before, precision, None)  # noqa: E731
        model.reshape({item: list(x.shape) for item, x in zip(model.inputs, fixed, strict=True)})
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" and computes_bf16() else "f32",
    }
    return OpenVinoRunner(shared_core().compile_model(model, "CPU", config), free)


def make(precision: str) -> Engine:
    """Make the OpenVINO engine for "f32", "bf16" or "int8"."""
    return OpenVinoEngine(precision)
