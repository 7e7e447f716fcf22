"""ONNX Runtime: fp32, and int8 weights per channel with activations quantised on the fly."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.bench.peers._base import Engine, Inputs, Runner
from nogemm.hardware.cpu import machine


class OnnxRunner(Runner):
    """Run a session on numpy views of the inputs."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.names = [item.name for item in session.get_inputs()]

    def prepare(self, inputs: Inputs) -> Any:
        return {name: x.contiguous().numpy() for name, x in zip(self.names, inputs, strict=True)}

    def run(self, prepared: Any) -> Any:
        return self.session.run(None, prepared)

    def result(self, outputs: Any) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(y) for y in outputs)


class OnnxEngine(Engine):
    """Export by torch.onnx with a varying batch, quantise if asked, and open a session."""

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def compile(self, module: nn.Module, example: Inputs, calibration: Sequence[Inputs]) -> Runner:
        import onnxruntime

        with tempfile.TemporaryDirectory(prefix="nogemm-onnx-") as folder:
            path = Path(folder) / "model.onnx"
            export(module, example, path)
            if self.precision == "int8":
                path = _quantise(path)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.inter_op_num_threads = 1
            options.log_severity_level = 3
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            # A spinning pool would take the cores from the engine that is being timed.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            return OnnxRunner(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def export(module: nn.Module, example: Inputs, path: Path) -> None:
    """Write a module as ONNX; dimension 0, and dimension 1 of integer inputs (token ids), may vary."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1)
    shapes = tuple({0: batch} if x.is_floating_point() else {0: batch, 1: length} for x in example)
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    # An extent of 1 would be taken for a constant, so the export sees two of everything that may vary.
    wide = tuple(_at_least_two(x) for x in example)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                wide,
                str(path),
                dynamo=True,
                dynamic_shapes=(shapes,) if variadic else shapes,
                external_data=True,
                verbose=False,
            )
    finally:
        logging.disable(level)


def _at_least_two(x: Tensor) -> Tensor:
    for dim in (0,) if x.is_floating_point() else (0, 1):
        if x.shape[dim] == 1:
            x = torch.cat([x, x], dim)
    return x


def _quantise(path: Path) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out = path.with_name("int8.onnx")
    model = onnx.load(path)
    # The exporter's notes on inner shapes are stale after its own rewriting of transposed weights; drop them.
    del model.graph.value_info[:]
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # Without the int8 dot product, pairs of 8-bit products saturate in 16 bits; weights of 7 bits cannot.
        dots = {"avx512_vnni", "avx_vnni"} & set(machine()["isa"])
        quantize_dynamic(model, out, per_channel=True, weight_type=QuantType.QInt8, reduce_range=not dots)
    finally:
        logging.disable(level)
    return out


def make(precision: str) -> Engine:
    """Make the ONNX Runtime engine for "fp32" or "int8"."""
    return OnnxEngine(precision)
