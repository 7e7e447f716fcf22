"""Projections in the layers that hash or route: SLIDE, MONGOOSE, YOSO and Switch with every one of them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nogemm
from nogemm.config import layer_config, parse_set
from nogemm.errors import ConfigError
from nogemm.layers import DenseFFN, MongooseFFN, SwitchFFN, YosoFFN
from nogemm.projections import Projection
from nogemm.testing.compare_model import answer_to, check_answers, check_same_tensors

PROJECTIONS = [
    nogemm.BHConfig(block=8),
    nogemm.AcdcConfig(depth=2),
    nogemm.HadamardChainConfig(depth=2),
    nogemm.ShuffleProjectionConfig(block=5),
    nogemm.RandomHadamardConfig(),
    nogemm.LowRankConfig(rank=9),
    nogemm.DenseProjectionConfig(bias=False),
]
LAYERS: list[tuple[Any, dict[str, Any]]] = [
    (nogemm.SlideConfig, {"bits": 3, "tables": 7}),
    (nogemm.MongooseConfig, {"bits": 3, "tables": 4, "chunk": 4, "norm": True}),
    (nogemm.YosoConfig, {"hashes": 9, "bits": 3}),
    (nogemm.SwitchConfig, {"experts": 5, "hidden": 17, "norm": True}),
]
projections = pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: p.kind)
layers = pytest.mark.parametrize(("make", "settings"), LAYERS, ids=[make.kind for make, _ in LAYERS])
TRAINED = (nogemm.MongooseConfig, nogemm.SwitchConfig)


def build(make: Any, settings: dict[str, Any], projection: Any) -> Any:
    """Make a layer from 12 to 10 numbers whose biases are not 0 and whose neurons weigh something."""
    layer = make(projection=projection, **settings).build(12, 10, hidden=37).eval()
    for name, parameter in layer.named_parameters():
        if name.endswith(("bias", "values")):
            torch.nn.init.normal_(parameter)
    if isinstance(layer, MongooseFFN):
        layer.build_tables()
    return layer


def used(layer: Any) -> Projection:
    """Return the projection inside."""
    return next(module for module in layer.modules() if isinstance(module, Projection))


def written_out(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Answer from the definition, with the projection written out as one matrix."""
    projection = used(layer)
    matrix, bias = projection.dense_matrix(), projection.bias
    bias = torch.zeros(projection.d_out, dtype=x.dtype) if bias is None else bias
    v = x if layer.norm is None else layer.norm(x)
    if isinstance(layer, SwitchFFN):
        p = (v @ matrix.T + bias).softmax(-1)
        best = p.argmax(-1)
        return torch.stack([p[n, e] * layer.experts[int(e)](v[n]) for n, e in enumerate(best)])

    def codes(z: torch.Tensor) -> torch.Tensor:
        return (z > 0).unflatten(1, (-1, 3))

    if isinstance(layer, YosoFFN):
        same = codes(v @ matrix.T).unsqueeze(1) == codes(layer.keys @ matrix.T).unsqueeze(0)
        return same.all(-1).to(x.dtype).mean(-1) @ layer.values + layer.bias
    up = layer.neurons.up
    neurons = codes(up.weight @ matrix.T + up.bias.unsqueeze(1) * bias)
    found = (codes(v @ matrix.T + bias).unsqueeze(1) == neurons.unsqueeze(0)).all(-1).any(-1)
    found = torch.cat([part.any(0, keepdim=True).expand_as(part) for part in found.split(layer.chunk)])
    return (F.gelu(up(v)) * found) @ layer.neurons.down.weight.T + layer.neurons.down.bias


@layers
@projections
def test_a_projection_in_every_layer(make: Any, settings: dict[str, Any], projection: Any) -> None:
    layer = build(make, settings, projection)
    x = torch.randn(21, 12)
    wide = layer.double()
    with torch.no_grad():
        expected = written_out(wide, x.double())
        torch.testing.assert_close(wide(x.double()), expected, rtol=1e-9, atol=1e-9)
    layer = wide.float()
    y = layer(x).detach()
    assert y.shape == (21, 10)

    config = layer_config(json.loads(json.dumps(layer.config.to_dict())))
    assert config == layer.config
    with torch.device("meta"):
        other = config.build(12, 10, hidden=37)
    other.load_state_dict(layer.state_dict(), assign=True)
    check_same_tensors("read", other, layer)
    check_answers("read", other.eval()(x).detach(), layer, answer_to(x))

    for tokens in (0, 1, 21):
        part = x[:tokens]
        torch.testing.assert_close(layer.pack("fp32")(part), layer(part), rtol=1e-4, atol=1e-5)
    for dtype in ("bf16", "int8"):
        assert float((layer.pack(dtype)(x) - y).norm()) <= 0.02 * float(y.norm())
    assert float((layer.pack("int8")(x.roll(1, 0)) - y).norm()) > 0.1 * float(y.norm())

    layer.train()(torch.randn(200, 12)).square().sum().backward()
    trained = list(used(layer).parameters())
    if make in TRAINED:
        assert trained
        assert all(p.grad is not None and bool(p.grad.any()) for p in trained)
        assert {id(p) for p in layer.projection_parameters()} == {id(p) for p in used(layer).weights()}
    else:
        assert not trained
    others = [p for p in layer.parameters() if p.dim() > 1 and not any(p is t for t in trained)]
    assert any(p.grad is not None and bool(p.grad.any()) for p in others)


@layers
@projections
def test_cost_is_the_projections(make: Any, settings: dict[str, Any], projection: Any) -> None:
    layer = build(make, settings, projection)
    plain = make(**settings).build(12, 10, hidden=37)
    own = used(layer).cost(4)
    outputs = used(layer).d_out
    theirs = plain.hash.cost(4).flops if make is nogemm.YosoConfig else 2.0 * 12 * outputs
    if issubclass(make, (nogemm.SlideConfig, nogemm.MongooseConfig)):
        theirs += 2.0 * outputs  # of the last plane
    assert layer.cost(3).flops - plain.cost(3).flops == pytest.approx(3 * (own.flops - theirs))
    assert layer.cost(3).parameters >= sum(p.numel() for p in layer.parameters())
    assert layer.cost(0).flops == 0
    assert layer.cost(0).bytes_read == 0
    bytes_of_weights = sum(t.numel() for t in (*used(layer).parameters(), *used(layer).buffers())) * 4
    assert own.bytes_read == bytes_of_weights


@layers
def test_without_a_projection_nothing_changes(make: Any, settings: dict[str, Any]) -> None:
    layer = make(**settings).build(12, hidden=37)
    assert not any("projection" in name for name in layer.state_dict())
    old = {name: value for name, value in layer.config.to_dict().items() if name != "projection"}
    assert layer_config(old) == layer.config
    assert layer_config(layer.config.to_dict()) == layer.config


@layers
def test_words(make: Any, settings: dict[str, Any]) -> None:
    assert parse_set(make, ["projection.block=64"]) == make(projection=nogemm.BHConfig(block=64))
    assert parse_set(make, ["projection=acdc", "projection.depth=3"]) == make(projection=nogemm.AcdcConfig(depth=3))
    assert parse_set(make, ["projection=null"]) == make()


@layers
def test_bad_projections_are_named(make: Any, settings: dict[str, Any]) -> None:
    owner = make.__name__
    with pytest.raises(ConfigError, match=f"{owner}.*projection=3"):
        make(projection=3)
    with pytest.raises(ConfigError, match=f"{owner}.*projection='acdc'.*faithful=True"):
        make(projection=nogemm.AcdcConfig(), faithful=True)
    with pytest.raises(ConfigError, match=r"block=64.* 16 \(d_in=12"):
        make(projection=nogemm.BHConfig(), **settings).build(12, hidden=37)
    learnable = nogemm.RandomHadamardConfig(learnable=True)
    if make in TRAINED:
        assert list(used(make(projection=learnable, **settings).build(12, hidden=37)).weights())
    else:
        with pytest.raises(ConfigError, match=f"{owner}.*projection.learnable=True"):
            make(projection=learnable)


def test_learned_hashes_need_something_to_learn() -> None:
    config = nogemm.MongooseConfig(projection=nogemm.RandomHadamardConfig(bias=False))
    with pytest.raises(ConfigError, match=r"MongooseConfig: projection=.*train"):
        config.build(12)


def test_random_hashes_stay_when_a_trainer_thaws_everything() -> None:
    layer = nogemm.SlideConfig(projection=nogemm.DenseProjectionConfig()).build(12, hidden=37).requires_grad_(True)
    before = {name: value.clone() for name, value in layer.state_dict().items() if "projection" in name}
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer(torch.randn(5, 12)).sum().backward()
    optimiser.step()
    assert before
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


@projections
def test_switch_starts_from_dense_weights(projection: Any) -> None:
    dense = DenseFFN.from_weights(
        torch.randn(40, 16) / 4, torch.randn(40) / 3, torch.randn(16, 40) / 6, torch.zeros(16)
    )
    x = torch.randn(600, 16)
    copies = nogemm.SwitchConfig(experts=3, projection=projection).build(16, hidden=40).eval()
    assert copies.fit_dense(dense) == "closed-form"
    assert float((copies(x) - dense(x)).norm()) < 0.15 * float(dense(x).norm())
    carved = nogemm.SwitchConfig(experts=3, hidden=30, projection=projection).build(16, hidden=40).eval()
    before = float((carved(x) - dense(x)).norm())
    assert carved.fit_activations(dense, x) == "closed-form"
    assert float((carved(x) - dense(x)).norm()) < 0.8 * before


def test_a_residual_router_cannot_be_made_constant() -> None:
    dense = nogemm.DenseConfig().build(16, hidden=40)
    config = nogemm.SwitchConfig(experts=3, projection=nogemm.BHConfig(block=8, residual=0.7))
    assert config.build(16, hidden=40).fit_dense(dense) == "random"


@projections
def test_yoso_samples_near_its_expectation(projection: Any) -> None:
    if isinstance(projection, nogemm.LowRankConfig):
        projection = nogemm.LowRankConfig(rank=50)  # few directions would not see most of an angle
    layer = nogemm.YosoConfig(hashes=800, bits=2, norm=False, projection=projection).build(64, hidden=100).eval()
    x = torch.randn(30, 64)
    with torch.no_grad():
        torch.nn.init.normal_(layer.keys)
        share, expected = layer.hashed(x), layer.expected(x)
        error = float((share - expected).norm())
        assert error < 0.25 * float(expected.norm())
        assert error < 0.75 * float((share - expected.roll(1, 0)).norm())
