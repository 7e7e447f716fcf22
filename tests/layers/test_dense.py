"""The dense baselines: values, exact copies, chosen neurons, the constant layer."""

import pytest
import torch
import torch.nn.functional as F

import nogemm
from nogemm.layers import ACTIVATIONS, DenseFFN
from nogemm.layers.dense.fit import forward_selection
from nogemm.testing.compare_model import answer_to, check_same_model


def dense(gated: bool = False, activation: str = "gelu") -> DenseFFN:
    gate = torch.randn(48, 16) / 4 if gated else None
    up, down = torch.randn(48, 16) / 4, torch.randn(16, 48) / 7
    return DenseFFN.from_weights(up, torch.randn(48), down, torch.randn(16), gate, activation=activation)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [False, True])
def test_values(gated: bool, activation: str) -> None:
    layer, x = dense(gated, activation), torch.randn(3, 5, 16)
    act = ACTIVATIONS[activation]
    hidden = F.linear(x, layer.up.weight, layer.up.bias)
    hidden = act(hidden) if layer.gate is None else act(F.linear(x, layer.gate.weight)) * hidden
    torch.testing.assert_close(layer(x), F.linear(hidden, layer.down.weight, layer.down.bias))


@pytest.mark.parametrize("gated", [False, True])
def test_equal_width_is_exact(gated: bool) -> None:
    source, x = dense(gated), torch.randn(7, 16)
    copy = nogemm.DenseConfig().build(16, hidden=48, gated=gated)
    assert copy.fit_dense(source) == "exact"
    check_same_model("copy", copy, source, answer_to(x))


def test_fewer_neurons_are_chosen_and_refitted() -> None:
    source, x = dense(), torch.randn(3000, 16)
    target = source(x).detach()
    by_size = nogemm.DenseConfig(hidden=24).build(16, hidden=48)
    by_size.fit_dense(source)
    fitted = nogemm.DenseConfig(hidden=24).build(16, hidden=48)
    assert fitted.fit_activations(source, x) == "closed-form"
    errors = [float((layer(x) - target).square().mean().detach()) for layer in (fitted, by_size)]
    assert errors[0] < 0.5 * errors[1]


def test_forward_selection_finds_the_columns_that_were_used() -> None:
    a = torch.randn(500, 20, dtype=torch.float64)
    y = a[:, [3, 11, 17]] @ torch.randn(3, 4, dtype=torch.float64)
    assert forward_selection(a.T @ a, a.T @ y, 3).tolist() == [3, 11, 17]


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_not_finite_tokens_stay_alone(broken: float, activation: str) -> None:
    plain, gated = dense(activation=activation), dense(True, activation)
    for layer in (plain.eval(), gated.eval()):
        for module in (layer, *(layer.pack(dtype) for dtype in ("fp32", "bf16", "int8"))):
            x = torch.randn(5, 16)
            x[2] = 0.0
            clean = module(x)
            x[2, -1] = broken
            y = module(x)
            assert y[2].isnan().all()
            torch.testing.assert_close(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])
            assert clean.isfinite().all()
