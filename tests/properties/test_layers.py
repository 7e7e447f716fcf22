"""What holds of every layer, whatever its choices, widths, dtype and instruction set; drawn by hypothesis.

`./run test` draws a few, always the same; `./run test --extra` draws many, and others each time (tests/conftest.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from strategies import Case, cases
from torch import Tensor, nn

from nogemm import ops
from nogemm.bench.engine.rounding import check_packed
from nogemm.config import layer_config
from nogemm.layers import FFN, PACK_DTYPES, PackedFFN
from nogemm.testing.cases import KINDS
from nogemm.testing.compare import check_equal
from nogemm.testing.compare_model import answer_to, check_answers, check_same_tensors

ISAS = st.sampled_from(ops.supported_isas() or ("reference",))
DTYPES = st.sampled_from(PACK_DTYPES)
PATHS = st.sampled_from(["auto", "rows"])
kinds = pytest.mark.parametrize("kind", sorted(KINDS))
# Native kernels add in one order, whatever the threads (tests/layers/test_conformance.py).
NATIVE = ("hire", "lookup", "tree", "yoso")


def rows(layer: FFN, count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, layer.shape.d_in, generator=torch.Generator().manual_seed(seed))


def typical(y: Tensor, expected: Tensor) -> float:
    """Return the median over tokens of |y - expected| as a share of a usual |expected|."""
    y, expected = y.double(), expected.double()
    usual = expected.norm(dim=-1).median().clamp_min(1e-30)
    return float((y - expected).norm(dim=-1).median() / usual)


@kinds
@given(data=st.data(), isa=ISAS, dtype=DTYPES, path=PATHS)
def test_packed_is_the_unpacked_layer_within_rounding(
    kind: str, data: st.DataObject, isa: str, dtype: str, path: str
) -> None:
    case: Case = data.draw(cases(kind))
    assume(kind != "yoso" or not getattr(case.config, "faithful", False))  # draws new signs in every call, by design
    layer = case.build()
    x = rows(layer, 120)

    def answer(module: nn.Module, computed_in: torch.dtype) -> Tensor:
        return module(x.to(computed_in))

    with ops.use_isa(isa), torch.inference_mode():
        y = layer.pack(dtype, path)(x)
        facts = check_packed(layer, layer.rounded(dtype), y, dtype, answer)
        assert facts["verified"], facts
        if y.any():
            assert not check_packed(layer, layer.rounded(dtype), -y, dtype, answer)["verified"]


@kinds
@given(data=st.data(), isa=ISAS, dtype=DTYPES, x_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_threads_and_batches_do_not_matter(
    kind: str, data: st.DataObject, isa: str, dtype: str, x_dtype: torch.dtype
) -> None:
    case: Case = data.draw(cases(kind))
    first = data.draw(st.integers(0, 150), label="first part of the batch")
    layer = case.build()
    x = rows(layer, 150).to(x_dtype)
    with ops.use_isa(isa), torch.inference_mode():
        packed = layer.pack(dtype, "rows")
        torch.set_num_threads(1)
        one = packed(x)
        torch.set_num_threads(2)
        two, parts = packed(x), torch.cat((packed(x[:first]), packed(x[first:])))
    assert one.dtype == x_dtype
    if kind in NATIVE and isinstance(packed, PackedFFN) and packed.native:
        check_equal("two threads", two, one)
    else:
        assert typical(two, one) <= torch.finfo(x_dtype).eps
    if getattr(case.config, "chunk", 1) > 1:
        return  # tokens of a chunk share their neurons, so another cut is another answer
    # int8 activations have one step for a call, so a batch in parts is rounded otherwise.
    assert typical(parts, one) <= (0.1 if layer.dynamic_int8 and dtype == "int8" else 1e-3 + torch.finfo(x_dtype).eps)


@kinds
@given(data=st.data())
def test_saved_and_loaded_is_the_same_layer(kind: str, data: st.DataObject) -> None:
    case: Case = data.draw(cases(kind))
    layer = case.build()
    with TemporaryDirectory() as place:
        file = Path(place) / "layer.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in layer.state_dict().items()}, file)
        text = json.dumps(case.config.to_dict(), allow_nan=False)
        config = layer_config(json.loads(text))
        assert config == case.config
        twin = Case(config, case.shape).build(seed=9)
        twin.load_state_dict(load_file(file))
    check_same_tensors(kind, twin, layer)
    answer = answer_to(rows(layer, 9))
    if any(True for _ in layer.parameters()):
        check_answers(kind, answer(twin), layer, answer)


@kinds
@given(data=st.data(), tokens=st.integers(0, 50), more=st.integers(0, 50))
def test_cost_adds_up(kind: str, data: st.DataObject, tokens: int, more: int) -> None:
    case: Case = data.draw(cases(kind))
    layer = case.build()
    some, others, all_ = layer.cost(tokens), layer.cost(more), layer.cost(tokens + more)
    if getattr(case.config, "chunk", 1) == 1:  # tokens of a chunk share their neurons
        assert all_.flops == pytest.approx(some.flops + others.flops)
    assert max(some.bytes_read, others.bytes_read) - 1e-6 <= all_.bytes_read
    assert all_.bytes_read <= (some.bytes_read + others.bytes_read) * (1 + 1e-9) + 1e-6
    trained = sum(parameter.numel() for parameter in layer.parameters())
    assert all_.parameters == some.parameters >= trained
    assert some.parameters <= trained + sum(
        buffer.numel() for buffer in layer.buffers()
    )  # compressed tables are buffers


def test_a_wrong_answer_is_seen() -> None:
    """Negative control of `typical`: tokens in another order are far apart."""
    y = torch.randn(50, 9)
    assert typical(y.roll(1, 0), y) > 0.5
    assert typical(y, y) == 0.0
