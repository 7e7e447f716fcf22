"""NeuronStore: named neurons, all at once, and a part of them agree, natively and in plain PyTorch."""

from typing import Any

import pytest
import torch

from nogemm.layers import DenseConfig, DenseFFN
from nogemm.layers.neurons.store import NeuronStore
from nogemm.testing.compare import check_equal

# Error of a token as a share of its norm: float32 sums; 16-bit fixed-point tokens beside int8 rows.
CLOSE = {"fp32": 2e-6, "bf16": 2e-6, "int8": 3e-4}


def build(gated: bool, activation: Any = "gelu") -> list[DenseFFN]:
    config = DenseConfig(hidden=37, activation=activation)
    layers = [
        config.build(19, 23, hidden=37, activation=activation, gated=gated).eval().requires_grad_(False)
        for _ in range(2)
    ]
    for layer in layers:
        torch.nn.init.normal_(layer.up.bias)
        torch.nn.init.zeros_(layer.down.bias)
    return layers


def off(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("gated", "activation"), [(False, "gelu"), (True, "silu"), (False, "gelu_new")])
def test_all_ways_agree(
    isa: str, gated: bool, activation: str, dtype: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr("nogemm.layers.neurons.store.native_available", lambda: False)
    layers = build(gated, activation)
    store = NeuronStore(layers, dtype)
    assert store.native == native
    x = torch.randn(9, 19)
    mask = torch.rand(9, 74) < 0.4
    mask[4] = False
    hidden = torch.cat([layer.hidden_activations(x) for layer in layers], 1)
    down = torch.cat([layer.down.weight.T for layer in layers])
    exact = (hidden * mask) @ down
    rounding = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2}[dtype]
    found = store(x, mask, "rows") if native else store(x, mask)
    assert off(found, exact) < rounding
    assert not found[4].any()
    assert off(found, ((hidden * mask.roll(1, 0)) @ down)) > 20 * rounding
    assert off(store(x, mask, "dense"), found) < CLOSE[dtype]
    whole = store(x, torch.ones_like(mask))
    parts = store.part(x, slice(0, 37)) + store.part(x, slice(37, 74))
    assert off(parts, whole) < CLOSE[dtype]
    first = [layer.up if layer.gate is None else layer.gate for layer in layers]
    assert off(store.selector(x), torch.cat([linear(x) for linear in first], 1)) < rounding


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_named_neurons_give_equal_bits_for_any_threads_and_batch(isa: str, dtype: str) -> None:
    store, x, mask = NeuronStore(build(True), dtype), torch.randn(40, 19), torch.rand(40, 74) < 0.3
    torch.set_num_threads(1)
    one = store.named(x, mask)
    torch.set_num_threads(2)
    check_equal("threads", store.named(x, mask), one)
    check_equal("batch", torch.cat([store.named(x[:3], mask[:3]), store.named(x[3:], mask[3:])]), one)


def test_masks_that_do_not_fit_are_refused() -> None:
    store = NeuronStore(build(False), "fp32")
    for mask in (torch.ones(3, 73, dtype=torch.bool), torch.ones(2, 74, dtype=torch.bool), torch.ones(3, 74)):
        with pytest.raises(ValueError, match="mask must be bool"):
            store.named(torch.randn(3, 19), mask)


def test_many_named_neurons_are_answered_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    store, x = NeuronStore(build(False), "fp32"), torch.randn(64, 19)
    called = []
    monkeypatch.setattr(store, "named", lambda *args: called.append("rows"))
    monkeypatch.setattr(store, "masked", lambda *args: called.append("dense"))
    few, many = torch.zeros(64, 74, dtype=torch.bool), torch.ones(64, 74, dtype=torch.bool)
    few[:, :2] = True
    for mask in (few, many):
        for path in ("auto", "rows", "dense"):
            store(x, mask, path)
    assert called == ["rows", "rows", "dense", "dense", "rows", "dense"]
