"""OpenVINO as a host: from a traced model to an IR file whose FFNs are our operator."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.errors import NativeError
from nogemm.export.agreement import Agreement, agreement
from nogemm.export.int8_range import bound_pairs
from nogemm.export.traced import OPERATORS, HostModel

OPERATOR = "PackedFFN"


def check_installed(package: str = "openvino") -> None:
    """Say what to install, unless it is there.

    Raises:
        NativeError: the package, openvino or nncf, is absent.
    """
    if importlib.util.find_spec(package) is None:
        raise NativeError(f"export: {package} is not installed: pip install 'nogemm[openvino]'")


def convert(model: HostModel, example: tuple[Tensor, ...], extension: Path) -> Any:
    """Trace a model and convert it to an ov.Model with dynamic batch and length."""
    import openvino
    from openvino.frontend.pytorch import ConversionExtension  # type: ignore[attr-defined]
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(extension))

    def translate(context: Any) -> Any:
        d_out = int(context.get_values_from_const_input(2))
        return factory.create(OPERATOR, [context.get_input(0), context.get_input(1)], {"d_out": d_out}).outputs()

    extensions = [ConversionExtension(f"nogemm::{name}", translate) for name in OPERATORS.values()]
    with quiet(), torch.no_grad():
        trace = torch.jit.trace(model, example, check_trace=False, strict=False)
        graph = openvino.convert_model(trace, example_input=example, extension=extensions)
    for item, name in zip(graph.inputs, model.input_names, strict=True):
        item.get_tensor().set_names({name})
    graph.outputs[0].get_tensor().set_names({model.output_name})
    graph.reshape(dict.fromkeys(range(len(graph.inputs)), openvino.PartialShape([-1, -1])))
    return graph


def quantise(graph: Any, samples: Sequence[tuple[Tensor, ...]]) -> Any:
    """Quantise a graph to int8 by NNCF, activation ranges taken from sample inputs.

    Weights are scaled so that 8-bit products overflow on no processor (`int8_range`): the file computes the same where
    there are no dot-product instructions.
    """
    with quiet():
        import nncf
        from openvino._offline_transformations import compress_quantize_weights_transformation

        rows = [{i: x.numpy() for i, x in enumerate(inputs)} for inputs in samples]
        quantised = nncf.quantize(
            graph,
            nncf.Dataset(rows),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(rows),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.DISABLE, backend_params={"compress_weights": False}
            ),
        )
        bound_pairs(quantised)
        compress_quantize_weights_transformation(quantised)
        return quantised


def save(graph: Any, path: Path) -> None:
    """Write .xml and .bin; float weights stay float32."""
    import openvino

    openvino.save_model(graph, str(path), compress_to_fp16=False)


@functools.cache
def shared_core() -> Any:
    """Return this process's one openvino.Core, which stays.

    The CPU plugin (2026.4 at least) gives the main thread a signal stack and hands the former one back when its Core
    dies. If the older of two Cores dies first, the younger hands back a stack that is gone, and the next Ctrl-C is a
    segmentation fault in place of a KeyboardInterrupt.
    """
    import openvino

    return openvino.Core()


@functools.cache
def computes_bf16() -> bool:
    """Say whether OpenVINO multiplies in bfloat16 here, which it then does unless it is told not to.

    It reports what the processor has. Held to a lesser instruction set it finds no such product, so one is compiled.
    """
    import numpy as np
    import openvino
    from openvino import opset15 as ov

    core = shared_core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return False
    x = ov.parameter([-1, 64], np.float32)
    y = ov.matmul(x, ov.constant(np.ones((64, 64), np.float32)), False, True)
    model = openvino.Model([y.output(0)], [x], "bf16")  # type: ignore[misc]
    try:
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        compiled([np.ones((4, 64), np.float32)])
    except RuntimeError:
        return False
    kinds = [item.get_rt_info()["primitiveType"].astype(str) for item in compiled.get_runtime_model().get_ops()]
    return any(kind.endswith("bf16") for kind in kinds)


@functools.cache
def _extend(extension: Path) -> None:
    shared_core().add_extension(str(extension))


def load(path: Path, extension: Path) -> Any:
    """Read a saved graph with its extension library, as a user would."""
    _extend(extension.resolve())
    return shared_core().read_model(str(path))


def compare(path: Path, extension: Path, model: nn.Module, batches: Sequence[tuple[Tensor, ...]]) -> Agreement:
    """Run the saved graph and the torch model on batches of inputs, the mask second among them, and compare."""
    graph = load(path, extension)
    compiled = shared_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = [torch.from_numpy(compiled([x.numpy() for x in inputs])[0].copy()) for inputs in batches]
    with torch.inference_mode():
        expected = [model(*inputs) for inputs in batches]
    return agreement(found, expected, [inputs[1] for inputs in batches])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and notices of the converters out of our output."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
