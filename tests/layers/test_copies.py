"""Layers of every kind as objects: pickled, copied, and quantised by torch, unpacked and packed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nogemm
from nogemm import ops
from nogemm.config import LayerConfig
from nogemm.convert.fitted import is_random, mark_random
from nogemm.errors import PackedError
from nogemm.layers import FFN, PACK_DTYPES, LookupFFN
from nogemm.layers._base import is_quantised
from nogemm.layers.token_table.layer import make_ids_up
from nogemm.testing.cases import KINDS

WIDTH = 32
kinds = pytest.mark.parametrize("kind", KINDS)
gates = pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "deepcopy": copy.deepcopy,
}
copies = pytest.mark.parametrize("name", COPIES)


def build(config: LayerConfig, gated: bool = False) -> FFN:
    layer = config.build(WIDTH, hidden=48, gated=gated).eval()
    for parameter in layer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter)
    make_ids_up(layer)
    return layer


def quantise(module: nn.Module) -> Any:
    return torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, dtype=torch.qint8)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


@copies
@kinds
def test_a_copy_answers_the_same(kind: str, name: str) -> None:
    layer, x = build(KINDS[kind]), torch.randn(5, WIDTH)
    mark_random(layer)
    expected = layer(x)  # first: what a layer keeps of a call is copied along
    twin = COPIES[name](layer)
    torch.testing.assert_close(twin(x), expected)  # not bit by bit: torch's products know where their numbers lie
    for dtype in PACK_DTYPES:
        packed = layer.pack(dtype)
        torch.testing.assert_close(COPIES[name](packed)(x), packed(x), msg=dtype)


@pytest.mark.parametrize("dtype", PACK_DTYPES)
@pytest.mark.parametrize("kind", ["hire", "lookup", "tree", "yoso"])
def test_a_packed_layer_may_go_to_another_processor(kind: str, dtype: str, isa: str) -> None:
    """What is packed for one instruction set runs under any other."""
    x = torch.randn(40, WIDTH)
    with ops.use_isa((ops.supported_isas() or (ops.isa(),))[-1]):
        packed = build(KINDS[kind]).pack(dtype)
        expected, data = packed(x), pickle.dumps(packed)
    y = pickle.loads(data)(x)
    # A code bit or a turn near its threshold may fall otherwise; most tokens must not differ by more than rounding.
    apart_N = (y - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(apart_N.median()) < 1e-2


@copies
def test_a_copy_knows_whether_it_was_trained(name: str) -> None:
    layer = build(KINDS["lookup"])
    mark_random(layer)
    assert is_random(COPIES[name](layer))
    twin = COPIES[name](layer)
    with torch.no_grad():  # too little for the values to show it: the counter of writes does
        twin.get_parameter("tables").mul_(1.0)
    assert not is_random(twin)
    assert is_random(layer)
    with torch.no_grad():
        layer.get_parameter("tables").mul_(1.0)
    assert not is_random(COPIES[name](layer))


def test_a_mark_keeps_no_memory() -> None:
    layer = build(KINDS["lookup"])
    mark_random(layer)
    tables = weakref.ref(layer.get_parameter("tables"))
    assert isinstance(layer, LookupFFN)
    layer.compress()
    gc.collect()
    assert tables() is None


@gates
@kinds
def test_dynamic_quantisation_by_torch(kind: str, gated: bool) -> None:
    layer, x = build(KINDS[kind], gated).requires_grad_(False), torch.randn(200, WIDTH)
    quantised, expected = quantise(layer), layer(x)
    y = quantised(x)
    typical = ((y - expected).norm(dim=1) / expected.norm(dim=1)).median()
    assert float(typical) < 0.1
    assert quantised.cost(3).flops == layer.cost(3).flops
    assert quantised.cost(3).parameters == layer.cost(3).parameters
    touched = is_quantised(quantised)
    assert touched == any(isinstance(part, nn.Linear) for part in layer.modules())
    assert touched == (float(typical) > 1e-4) == (quantised.cost(1).bytes_read < layer.cost(1).bytes_read)
    if touched:
        with pytest.raises(PackedError, match=f"quantisation.*{type(layer).__name__}"):
            quantised.pack("fp32")
    # The advice of that message: pack first, and quantise what is left.
    for dtype in PACK_DTYPES:
        if kind in ("dense", "linear", "sum") and dtype == "bf16":
            continue  # an nn.Linear in bfloat16, which torch cannot quantise: wherever it stands
        packed = layer.pack(dtype)
        answer, rounded = packed(x), quantise(packed)(x)
        assert float(((rounded - answer).norm(dim=1) / answer.norm(dim=1)).median()) < 0.1, dtype


def test_a_quantised_layer_answers_as_the_dense_model_quantised() -> None:
    up, down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
    dense = nn.Sequential(up, nn.GELU(), down).eval()
    layer = nogemm.layers.DenseFFN.from_weights(up.weight, up.bias, down.weight, down.bias).eval()
    x = torch.randn(9, WIDTH)
    assert error(quantise(layer)(x), quantise(dense)(x)) < 1e-6
