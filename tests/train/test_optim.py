"""Optimiser groups, rates, clipping and losses."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import Pair
from torch import nn

from nogemm.convert import converted
from nogemm.train import DistilOptions
from nogemm.train.losses import Spread, class_loss, compared, embedding_loss, pooled, relative_error
from nogemm.train.optim import (
    backbone_parameters,
    clip_gradients,
    layer_groups,
    load_optimiser_tensors,
    make_optimiser,
    optimiser_tensors,
    rate_factor,
    set_rates,
)


def test_groups_hold_every_parameter_once(pair: Pair) -> None:
    layers = list(converted(pair.model).values())
    groups = {**layer_groups(layers), "backbone": backbone_parameters(pair.model, layers, embeddings=True)}
    ids = [id(p) for group in groups.values() for p in group]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in pair.model.parameters()}
    assert {id(p) for p in groups["tables"]} == {id(layer.get_parameter("tables")) for layer in layers}
    projections = {id(layer.get_parameter("projection.weight")) for layer in layers}
    assert projections <= {id(p) for p in groups["projection"]}
    embeddings = {id(m.weight) for m in pair.model.modules() if isinstance(m, nn.Embedding)}
    assert not embeddings & {id(p) for p in backbone_parameters(pair.model, layers, embeddings=False)}


def test_rates_and_decay_of_the_groups(pair: Pair) -> None:
    layers = list(converted(pair.model).values())
    groups = {**layer_groups(layers), "backbone": backbone_parameters(pair.model, layers, embeddings=False)}
    options = DistilOptions(lr_tables=3.0, lr_projection=2.0, lr_backbone=0.0, weight_decay=0.1)
    optimiser, rates = make_optimiser(groups, options)
    found = {(g["name"], g["lr"], g["weight_decay"]) for g in optimiser.param_groups}
    assert ("tables", 3.0, 0.0) in found
    assert ("projection", 2.0, 0.1) in found
    assert not any(name == "backbone" for name, _, _ in found)
    set_rates(optimiser, rates, 0.5)
    assert {g["lr"] for g in optimiser.param_groups if g["name"] == "tables"} == {1.5}


def test_the_schedule_rises_and_falls() -> None:
    factors = [rate_factor(i / 100, 0.1) for i in range(101)]
    assert factors[10] == pytest.approx(1.0)
    assert factors[5] == pytest.approx(0.5)
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[100] < 0.01
    assert max(factors) <= 1.0
    assert rate_factor(0.0, 0.0) == 1.0


def test_optimiser_state_survives_saving() -> None:
    def make() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.ones(3))
        return parameter, make_optimiser({"tables": [parameter]}, DistilOptions())[0]

    def step(parameter: nn.Parameter, optimiser: torch.optim.Optimizer, value: float) -> None:
        parameter.grad = torch.full((3,), value)
        optimiser.step()

    one, first = make()
    step(one, first, 1.0)
    two, second = make()
    two.data.copy_(one.data)
    load_optimiser_tensors(second, optimiser_tensors(first))
    step(one, first, -2.0)
    step(two, second, -2.0)
    assert one.equal(two)
    three, fresh = make()
    three.data.copy_(one.data)
    step(three, fresh, -2.0)
    step(one, first, -2.0)
    assert not three.equal(one)


def test_clipping() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
    assert clip_gradients([parameter], 2.0) == pytest.approx(1.0)
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))
    parameter.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(clip_gradients([parameter], 1.0))
    assert clip_gradients([nn.Parameter(torch.zeros(1))], 1.0) == 0.0


def test_spread_is_the_variance_of_everything_seen() -> None:
    x = torch.randn(500, 3) * torch.tensor([1.0, 10.0, 2.0]) + 7
    spread = Spread(3)
    for part in x.split([100, 250, 150]):
        spread.update(part)
    torch.testing.assert_close(spread.weights(), 1 / x.var(0, correction=0), rtol=1e-4, atol=0)
    other = Spread(0)
    other.load_state(spread.state())
    assert other.weights().equal(spread.weights())


def test_an_outlier_dimension_does_not_hide_the_rest() -> None:
    target = torch.randn(1000, 8)
    target[:, 0] *= 100
    spread = Spread(8)
    spread.update(target)
    guess = target.clone()
    guess[:, 0] = target[:, 0].mean()
    assert relative_error(guess, target, spread.weights()).item() == pytest.approx(1 / 8, rel=0.01)
    flat = Spread(2)
    flat.update(torch.tensor([[1.0, 5.0], [2.0, 5.0]]))
    assert flat.weights().isfinite().all()


def test_losses_ignore_padding_and_vanish_for_equal_outputs() -> None:
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    padded = hidden.clone()
    padded[1, 1:] = 99.0
    assert embedding_loss(padded, hidden, mask).item() == pytest.approx(0.0, abs=1e-6)
    assert embedding_loss(-hidden, hidden, mask).item() == pytest.approx(2.0)
    torch.testing.assert_close(pooled(hidden, mask)[1], hidden[1, 0] / hidden[1, 0].norm())
    goal, whole = compared(hidden, mask), hidden[:, 0]
    assert class_loss(compared(padded, mask), goal).item() == pytest.approx(0.0, abs=1e-6)
    assert class_loss(compared(hidden.flip(-1), mask), goal).item() > 0.1
    assert compared(whole, mask) is whole
