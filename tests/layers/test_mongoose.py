"""MONGOOSE: hashes that learn, and the schedule of their tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nogemm
from nogemm.layers import MongooseFFN


def test_the_schedule_rebuilds_only_after_the_hashes_moved() -> None:
    layer = nogemm.MongooseConfig(bits=3, tables=4, rebuild=0.2).build(12, hidden=37)
    x = torch.randn(20, 12)
    layer(x)
    assert layer.rebuilds == 1  # the one that made the tables
    with torch.no_grad():
        layer.planes[:, :3] *= -1  # all bits of one table of four
    assert layer.changed() == pytest.approx(0.25, abs=0.01)
    with torch.no_grad():
        layer(x)
    assert layer.rebuilds == 1  # nobody is training
    layer(x)
    assert layer.rebuilds == 2
    assert layer.changed() < 0.01
    every = nogemm.MongooseConfig(faithful=True).build(12, hidden=37)
    every(x)
    every(x)
    assert every.rebuilds == 3
    with torch.no_grad():
        every.planes.neg_()
        packed, answer = every.eval().pack("fp32"), every(x)
    assert every.rebuilds == 5  # by packing, and in evaluation
    assert every.changed() < 0.01
    torch.testing.assert_close(packed(x), answer)


def triplet_layer(**settings: Any) -> MongooseFFN:
    """Two planes along the axes, four neurons without biases; the first is in no bucket that tokens look into."""
    layer = nogemm.MongooseConfig(bits=1, tables=2, **settings).build(2, hidden=4)
    with torch.no_grad():
        layer.planes.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        layer.neurons.up.weight.copy_(torch.tensor([[4.0, -1.0], [-1.0, 1.0], [-2.0, 1.0], [-0.5, -1.0]]))
        layer.neurons.up.bias.zero_()
        layer.build_tables()
        layer.get_buffer("codes").copy_(torch.tensor([[0, 0], [0, 1], [0, 1], [0, 0]]))
    return layer


# Token (1, 1), codes 1 1: products 3, 0, -1, -1.5; found are neurons 1 and 2, which share its second code.
# Bars: int(0.999 * 4) = 3rd smallest: 0; int(0.5 * 4) = 2nd smallest: -1, which neuron 2 is not below.
# Token (1, 2), codes 1 1: products 2, 1, 0, -2.5; bars 1 and 0.
UP_RIGHT, STEEP = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 2.0]])
NEAR_UP_RIGHT = 3 / (2**0.5 * 17**0.5)  # of neuron 0
FAR_UP_RIGHT = -1 / (2**0.5 * 5**0.5)  # of neuron 2
NEAR_STEEP = 2 / (5**0.5 * 17**0.5)


def test_triplet_loss_by_hand() -> None:
    layer = triplet_layer()
    assert float(layer.triplet_loss(UP_RIGHT).detach()) == 0.0  # a positive without a negative is no pair
    # Bars over both: (0 + 1) / 2 and (-1 + 0) / 2. Positive: neuron 0 for both. Negative: neuron 2 for the first.
    expected = FAR_UP_RIGHT - NEAR_UP_RIGHT + 1
    both = torch.cat((UP_RIGHT, STEEP))
    assert float(layer.triplet_loss(both).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_lone_token_has_its_pair() -> None:
    layer = triplet_layer()
    with torch.no_grad():
        layer.neurons.up.weight[3] = torch.tensor([-6.0, 4.0])
    layer.get_buffer("codes")[3] = torch.tensor([0, 1])
    # Products 3, 0, -1, -2: neuron 3 is found and below the 2nd smallest, neuron 0 missed and above the 3rd.
    far = -2 / (2**0.5 * 52**0.5)
    assert float(layer.triplet_loss(UP_RIGHT).detach()) == pytest.approx(far - NEAR_UP_RIGHT + 1, rel=1e-5)
    one = nogemm.MongooseConfig(bits=1, tables=1).build(2, hidden=1)
    assert float(one.triplet_loss(UP_RIGHT).detach()) == 0.0  # of one neuron neither bar is passed


def test_faithful_triplet_loss_is_the_mean_over_chunks() -> None:
    both = torch.cat((UP_RIGHT, STEEP))
    # One chunk of two: positives neuron 0 of both tokens, one negative; a random positive is paired with it.
    shared = triplet_layer(faithful=True, chunk=2)
    expected = {round(FAR_UP_RIGHT - near + 1, 3) for near in (NEAR_UP_RIGHT, NEAR_STEEP)}
    assert {round(float(shared.triplet_loss(both).detach()), 3) for _ in range(40)} == expected
    # Two chunks of one: neither has a negative of its own.
    apart = triplet_layer(faithful=True, chunk=1)
    assert float(apart.triplet_loss(both).detach()) == 0.0
    # Chunks (first, second), (first): the one without a pair counts as 0.
    three = torch.cat((both, UP_RIGHT))
    halves = {round(2 * float(shared.triplet_loss(three).detach()), 3) for _ in range(40)}
    assert halves == expected


def test_learning_finds_more_of_the_large_products() -> None:
    source = torch.randn(6, 16)  # neurons and tokens lie near six directions
    layer = nogemm.MongooseConfig(bits=5, tables=2, triplet_weight=1.0).build(16, hidden=120)
    with torch.no_grad():
        layer.neurons.up.weight.copy_(source[torch.arange(120) % 6] + 0.7 * torch.randn(120, 16))
        layer.build_tables()

    def draw() -> torch.Tensor:
        return source[torch.randint(6, (200,))] + 0.7 * torch.randn(200, 16)

    def selectivity() -> float:
        x = draw()
        best = layer.neurons.up(x).topk(6, 1).indices
        mask = layer.retrieved(x).float()
        return float(mask.gather(1, best).mean() / mask.mean())

    before = sum(selectivity() for _ in range(5))
    planes = layer.planes.detach().clone()
    optimiser = torch.optim.Adam([layer.planes], lr=0.02)
    for _ in range(100):
        optimiser.zero_grad()
        (0.0 * layer(draw()).sum()).backward()
        optimiser.step()
    layer.build_tables()
    assert not torch.equal(layer.planes, planes)
    assert sum(selectivity() for _ in range(5)) > 1.05 * before


def test_faithful_hashes_learn() -> None:
    x = torch.randn(50, 12)
    mongoose = nogemm.MongooseConfig(bits=2, tables=2, chunk=50, faithful=True).build(12, hidden=37)
    assert float(mongoose.triplet_loss(x).detach()) > 0
    mongoose(x).sum().backward()
    assert mongoose.planes.grad is not None
    assert bool(mongoose.planes.grad.any())
