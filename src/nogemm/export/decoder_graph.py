"""The OpenVINO graph of a decoder: converted, given a memory, its matrices compressed, its head attached.

Reading order is the order of the steps: `convert_body`, `remember`, `compress_body`, `attach_head`. A graph that was
read back may get another way to its tokens: `choose_tokens`, `proof_graph`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogemm.errors import ConfigError, NogemmError
from nogemm.export.cached import INPUTS, CachedDecoder
from nogemm.export.openvino_host import computes_bf16, quiet, shared_core
from nogemm.export.traced import OPERATORS
from nogemm.heads import HeadConfig

BODIES = ("float", "int8", "int4")
GROUP = 32  # weights that share a scale in int4, as in GGUF's own four-bit kinds
STATE, TOKEN, LOGIT, EXACT, LOGITS = "state", "token", "logit", "exact", "logits"
NOISE = "noise"


@dataclass(frozen=True, kw_only=True)
class GraphHead:
    """What a graph needs of a vocabulary head.

    Attributes:
        rows: [V, D], as stored, float32, bfloat16 or float16.
        bias: float32 [V], or None.
        codes: packed (`nogemm.ops.packed_head`), or None: a dense head, multiplied by OpenVINO.
        config: of a converted head; None: a dense one.
        deferred_bytes: see `nogemm.heads.deferred_bytes`.
        tied: whether `rows` are the embedding's, too.
        scale, cap: what the model does to its head's logits, see `nogemm.decoding.states.Scaling`.
    """

    rows: Tensor
    bias: Tensor | None
    codes: Tensor | None
    tied: bool
    scale: float
    cap: float | None
    config: HeadConfig | None = None
    deferred_bytes: int = 0


class Factory:
    """Makes our operators."""

    def __init__(self, extension: Path) -> None:
        from openvino.utils.node_factory import NodeFactory

        self.own = NodeFactory()
        self.own.add_extension(str(extension))

    def __call__(self, name: str, inputs: list[Any], **attributes: int) -> Any:
        return self.own.create(name, inputs, attributes)


def convert_body(decoder: CachedDecoder, factory: Factory) -> Any:
    """Trace a decoder; return an ov.Model whose outputs are the last state, then all keys and values."""
    import openvino
    from openvino.frontend.pytorch import ConversionExtension  # type: ignore[attr-defined]

    def packed(context: Any) -> Any:
        d_out = int(context.get_values_from_const_input(2))
        return factory("PackedFFN", [context.get_input(0), context.get_input(1)], d_out=d_out).outputs()

    def rows(context: Any) -> Any:
        dtype = int(context.get_values_from_const_input(2))
        return factory("EmbedRows", [context.get_input(0), context.get_input(1)], dtype=dtype).outputs()

    extensions = [ConversionExtension(f"nogemm::{name}", packed) for name in OPERATORS.values()]
    extensions.append(ConversionExtension("nogemm::embed_rows", rows))
    example = decoder.example()
    with quiet(), torch.no_grad():
        trace = torch.jit.trace(decoder, example, check_trace=False, strict=False)
        graph = openvino.convert_model(trace, example_input=example, extension=extensions)
    names = [*INPUTS, *_past_names(decoder)]
    shapes: dict[int, Any] = {i: openvino.PartialShape([-1, -1]) for i in range(3)}
    shapes[3] = openvino.PartialShape([-1])
    for i, (heads, width) in enumerate(decoder.shapes):
        shapes[len(INPUTS) + i] = openvino.PartialShape([-1, heads, -1, width])
    if len(graph.inputs) != len(names):
        raise ConfigError("export: the model does not use each of the inputs that generation gives it")
    for item, name in zip(graph.inputs, names, strict=True):
        item.get_tensor().set_names({name})
    for item, name in zip(graph.outputs, [STATE, *(f"present.{name}" for name in names[len(INPUTS) :])], strict=True):
        item.get_tensor().set_names({name})
    graph.reshape(shapes)
    return graph


def remember(graph: Any, decoder: CachedDecoder) -> None:
    """Turn keys and values into variables of the graph, in place; they begin with no token, in any batch."""
    from openvino import opset15 as ov
    from openvino._offline_transformations import apply_make_stateful_transformation

    apply_make_stateful_transformation(graph, {name: f"present.{name}" for name in _past_names(decoder)})
    ids = next(item for item in graph.inputs if INPUTS[0] in item.get_names())
    batch = ov.gather(ov.shape_of(ids, "i64"), ov.constant([0]), ov.constant(0))
    for node in graph.get_ordered_ops():
        if node.get_type_name() != "ReadValue":
            continue
        _, heads, _, width = (size.get_length() if size.is_static else 0 for size in node.get_output_partial_shape(0))
        shape = ov.concat([batch, *(ov.constant(np.array([n], np.int64)) for n in (heads, 0, width))], 0)
        node.set_arguments([ov.broadcast(ov.constant(np.float32(0)), shape).output(0)])
    graph.validate_nodes_and_infer_types()


def compress_body(graph: Any, body: str) -> Any:
    """Compress the matrices of attention and dense FFNs by NNCF: int8 with a scale a row, int4 with one a group."""
    if body == "float":
        return graph
    with quiet():
        import nncf

        if body == "int8":
            return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
        fallback = nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=4
        )
        return nncf.compress_weights(
            graph,
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            ratio=1.0,
            group_size=GROUP,
            all_layers=True,
            advanced_parameters=fallback,
        )


def attach_head(graph: Any, head: GraphHead, factory: Factory, *, int8: bool = False) -> Any:
    """Put a head behind a body: ours, or for comparison a dense one that OpenVINO multiplies.

    Ours has the outputs logits [B, 1, V], token, logit and exact [B, 1]; a dense one has logits. The state stays an
    output in both.

    Args:
        int8: a dense head's rows in int8 with a scale each, as NNCF would store them; else as they are.
    """
    import openvino
    from openvino import opset15 as ov

    state = graph.output(STATE).get_node().input_value(0)
    rows = _rows_of(graph, head)
    if head.codes is None:
        outputs = {LOGITS: _dense(state, head, int8)}
    else:
        codes = ov.constant(head.codes.numpy(), shared_memory=True)
        found = factory("HeadArgmax", [state, codes.output(0), rows])
        token, logit, exact = found.outputs()
        peak = factory("PeakLogits", [token, _scaled(logit, head)], vocabulary=head.rows.shape[0])
        outputs = {LOGITS: peak.output(0), TOKEN: token, LOGIT: logit, EXACT: exact}
    results = _results({**outputs, STATE: state})
    return openvino.Model(results, graph.get_sinks(), graph.get_parameters(), "decoder")  # type: ignore[call-arg]


def choose_tokens(graph: Any, factory: Factory, best: int = 0) -> Any:
    """Return a decoder with an exact head whose outputs are those of one way to its tokens, which takes noise.

    Args:
        best: 0: token and exact, [B, 1], of the proof. Above: token [B, 1] and state [B, 1, D] of a search that
            computes so many rows.
    """
    import openvino
    from openvino import opset15 as ov

    noise = ov.parameter([-1, -1], np.float32, name=NOISE)
    noise.output(0).get_tensor().set_names({NOISE})
    inputs = [*_head_inputs(graph), noise.output(0)]
    if best:
        token, state = factory("HeadSearch", inputs, best=best).outputs()
        outputs = {TOKEN: token, STATE: state}
    else:
        token, _, exact = factory("HeadArgmax", inputs).outputs()
        outputs = {TOKEN: token, EXACT: exact}
    parameters = [*graph.get_parameters(), noise]
    return openvino.Model(_results(outputs), graph.get_sinks(), parameters, "decoder")  # type: ignore[call-arg]


def proof_graph(graph: Any, factory: Factory) -> Any:
    """Return the exact head of a decoder alone: state [N, D] and noise to token and exact, [N].

    Its constants are those of the decoder: a host that maps them from a file holds them once.
    """
    import openvino
    from openvino import opset15 as ov

    _, codes, rows = _head_inputs(graph)
    width = _head_inputs(graph)[0].get_partial_shape()[2]
    named = {STATE: ov.parameter([-1, width], np.float32), NOISE: ov.parameter([-1, -1], np.float32)}
    for name, parameter in named.items():
        parameter.output(0).get_tensor().set_names({name})
    state, noise = (parameter.output(0) for parameter in named.values())
    token, _, exact = factory("HeadArgmax", [state, codes, rows, noise]).outputs()
    return openvino.Model(_results({TOKEN: token, EXACT: exact}), list(named.values()), "proof")  # type: ignore[call-arg]


def _head_inputs(graph: Any) -> list[Any]:
    """Return state, codes and rows of an exact head."""
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "HeadArgmax":
            return [node.input_value(i) for i in range(3)]
    raise NogemmError("the graph has no exact head")


def _results(outputs: dict[str, Any]) -> list[Any]:
    from openvino import opset15 as ov

    results = []
    for name, output in outputs.items():
        result = ov.result(output)
        result.output(0).get_tensor().set_names({name})
        results.append(result)
    return results


def save_graph(graph: Any, path: Path) -> None:
    """Write .xml and .bin; numbers stay as they are."""
    import openvino

    openvino.save_model(graph, str(path), compress_to_fp16=False)


def keep_outputs(graph: Any, names: tuple[str, ...]) -> None:
    """Drop the results that a caller does not read, and so the work on them, in place."""
    for item in list(graph.outputs):
        if not item.get_names() & set(names):
            graph.remove_result(item.get_node())


def compile_graph(graph: Any, threads: int = 0, precision: str | None = None) -> Any:
    """Compile for calls one after the other; precision "f32" switches every rounding of OpenVINO's own off.

    Keys and values are kept in 16 bits, or 32: those in eight, OpenVINO's own choice, change when a memory goes back.
    """
    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "KV_CACHE_PRECISION": cache_precision(),
    }
    if threads:
        config["INFERENCE_NUM_THREADS"] = threads
    if precision == "f32":
        config |= {
            "INFERENCE_PRECISION_HINT": "f32",
            "KV_CACHE_PRECISION": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
    return shared_core().compile_model(graph, "CPU", config)


def cache_precision() -> str:
    """Return the 16 bits that keys and values are kept in: those that OpenVINO computes in, where it does."""
    return "bf16" if computes_bf16() else "f16"


def _past_names(decoder: CachedDecoder) -> list[str]:
    return [f"past.{i // 2}.{'key' if i % 2 == 0 else 'value'}" for i in range(len(decoder.shapes))]


def _rows_of(graph: Any, head: GraphHead) -> Any:
    """Return the constant of the head's rows: the embedding's own, where they are the same."""
    from openvino import opset15 as ov

    if not head.tied:
        return ov.constant(head.rows.view(torch.uint8).numpy(), shared_memory=True).output(0)
    for node in graph.get_ordered_ops():
        if node.get_type_name() == "EmbedRows":
            return node.input_value(1)
    raise NogemmError("export: the graph has no embedding that the head could share")


def _dense(state: Any, head: GraphHead, int8: bool) -> Any:
    from openvino import opset15 as ov

    if int8:
        wide = head.rows.float()
        scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127.0
        steps = (wide / scale).round().to(torch.int8)
        rows = ov.multiply(ov.convert(ov.constant(steps.numpy()), "f32"), ov.constant(scale.numpy()))
    else:
        rows = ov.constant(head.rows.float().numpy())
    logits = ov.matmul(state, rows, False, True)
    if head.bias is not None:
        logits = ov.add(logits, ov.constant(head.bias.float().numpy()))
    return _scaled(logits.output(0), head)


def _scaled(logits: Any, head: GraphHead) -> Any:
    from openvino import opset15 as ov

    if head.scale != 1.0:
        logits = ov.multiply(logits, ov.constant(np.float32(head.scale))).output(0)
    if head.cap is not None:
        cap = ov.constant(np.float32(head.cap))
        logits = ov.multiply(ov.tanh(ov.divide(logits, cap)), cap).output(0)
    return logits
