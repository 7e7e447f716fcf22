"""int8 products that overflow on no processor: weights at the limit, OpenVINO held to AVX2, without dot products."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_export import batches, read
from tiny_export import TEXTS, build

import nogemm
from nogemm.export.int8_range import bound_pairs
from nogemm.export.openvino_host import shared_core

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the pairs in question are x86's")
K = 48

# A product of 8-bit numbers, before and after its ranges were bounded; prints the relative errors.
PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_int8_range import errors
kinds = ("weights", "columns", "activations")
print(json.dumps([errors(kind, bounded) for kind in kinds for bounded in (False, True)]))
"""


def product(kind: str) -> Any:
    """Build quantised x [?, K] times a matrix whose neighbouring inputs are both at the limit, as NNCF writes it."""
    import openvino
    from openvino import opset15 as ov

    def ranged(node: Any, low: float, high: float, levels: int) -> Any:
        ends = ov.constant(np.float32(low)), ov.constant(np.float32(high))
        return ov.fake_quantize(node, *ends, *ends, levels)

    x = ov.parameter([-1, K], np.float32)
    if kind == "activations":
        other = ov.parameter([-1, K], np.float32)
        y = ov.matmul(ranged(x, 0, 255, 256), ranged(other, -127, 127, 255), False, True)
        return openvino.Model([y.output(0)], [x, other], kind)  # type: ignore[misc]
    matrix = weights() if kind == "weights" else weights().T.copy()
    y = ov.matmul(ranged(x, 0, 255, 256), ranged(ov.constant(matrix), -127, 127, 255), False, kind == "weights")
    return openvino.Model([y.output(0)], [x], kind)  # type: ignore[misc]


def weights() -> np.ndarray:
    return np.random.default_rng(0).choice([-127.0, 127.0, 90.0, 3.0], (32, K)).astype(np.float32)


def errors(kind: str, bounded: bool) -> float:
    """Return the relative error of the product; activations are whole numbers near the top of their range."""
    graph = product(kind)
    if bounded:
        bound_pairs(graph)
    model = shared_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    x = np.random.default_rng(1).integers(200, 256, (20, K)).astype(np.float32)
    found = model([x, weights()] if kind == "activations" else [x])[0]
    expected = x @ weights().T
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_neighbours_at_the_limit_do_not_overflow_on_avx2() -> None:
    words = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)]
    done = subprocess.run(
        words, capture_output=True, text=True, check=True, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert all(error > 0.1 for error in found[0::2])  # as they are: sums of pairs end at 2^15
    assert all(error < 0.02 for error in found[1::2])  # bounded: a bit of precision at most


def test_small_weights_and_those_that_alternate_keep_their_scale() -> None:
    graph = product("weights")
    quantiser = next(x for x in graph.get_ordered_ops() if x.get_attributes().get("levels") == 255)
    from openvino import opset15 as ov

    alternating = np.tile(np.array([127, -127], np.float32), (32, K // 2))
    quantiser.input(0).replace_source_output(ov.constant(alternating).output(0))
    bound_pairs(graph)
    assert quantiser.input_value(2).get_node().get_data().max() == 127


def test_an_int8_export_computes_the_same_held_to_avx2(tokenizer: Any, tmp_path: Path) -> None:
    model = build(nogemm.DenseConfig())
    nogemm.export(model, tmp_path / "out", rest="int8", tokenizer=tokenizer, calibration=TEXTS)
    inputs = batches()
    here, there = read(tmp_path / "out", inputs), read(tmp_path / "out", inputs, ONEDNN_MAX_CPU_ISA="AVX2")
    for y, z, (_, mask) in zip(here, there, inputs, strict=True):
        cosine = torch.nn.functional.cosine_similarity(y, z, dim=-1)[mask.bool()]
        assert cosine.min() > 0.999
