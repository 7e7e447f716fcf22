"""What SLIDE and MONGOOSE share: retrieval, chunks, empty sets, packing, bad input."""

from typing import Any

import pytest
import torch

import nogemm
from nogemm.errors import ConfigError
from nogemm.layers import DenseFFN, MongooseFFN, SlideFFN

BOTH = [nogemm.SlideConfig, nogemm.MongooseConfig]
both = pytest.mark.parametrize("make", BOTH, ids=["slide", "mongoose"])
SETTINGS: list[dict[str, Any]] = [
    {"bits": 3, "tables": 4},
    {"bits": 2, "tables": 2, "chunk": 3, "norm": True},
    {"bits": 9, "tables": 1},  # mostly empty sets
    {"bits": 1, "tables": 9, "chunk": 50, "activation": "relu"},
]


def build(make: Any, settings: dict[str, Any], gated: bool = False) -> Any:
    layer = make(**settings).build(12, 20, hidden=37, gated=gated).eval()
    torch.nn.init.normal_(layer.neurons.up.bias)
    if isinstance(layer, MongooseFFN):
        layer.build_tables()
    return layer


def dense(width: int = 16, hidden: int = 64) -> DenseFFN:
    up, down = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    return DenseFFN.from_weights(up, torch.randn(hidden) / 3, down, torch.randn(width) / 3)


def written_out(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Retrieve and compute with sets and loops, from the definition."""
    v = x if layer.norm is None else layer.norm(x)
    first = layer.neurons.up if layer.neurons.gate is None else layer.neurons.gate

    def buckets(extended: torch.Tensor) -> list[tuple[bool, ...]]:
        signs = (extended @ layer.planes.to(extended.dtype) > 0).tolist()
        return [tuple(signs[t * layer.bits : (t + 1) * layer.bits]) for t in range(layer.tables)]

    neurons = [buckets(torch.cat((w, b.reshape(1)))) for w, b in zip(first.weight, first.bias, strict=True)]
    rows = []
    for start in range(0, len(v), layer.chunk):
        part = v[start : start + layer.chunk]
        chosen: set[int] = set()
        for token in part:
            mine = buckets(torch.cat((token, torch.ones(1, dtype=x.dtype))))
            chosen |= {i for i, theirs in enumerate(neurons) if any(a == b for a, b in zip(mine, theirs, strict=True))}
        if not chosen and layer.falls_back:
            chosen = {int(first(token).argmax()) for token in part}
        for token in part:
            hidden = layer.neurons.hidden_activations(token)
            y = layer.neurons.down.bias.clone()
            for i in chosen:
                y = y + hidden[i] * layer.neurons.down.weight[:, i]
            rows.append(y)
    return torch.stack(rows)


@both
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("gated", [False, True])
def test_written_out(make: Any, settings: dict[str, Any], gated: bool) -> None:
    layer = build(make, settings, gated).double()
    x = torch.randn(11, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-9, atol=1e-9)


@both
def test_alone_or_in_company(make: Any) -> None:
    x = torch.randn(8, 12)
    alone, shared = build(make, SETTINGS[0]), build(make, {"bits": 3, "tables": 4, "chunk": 8})
    with torch.no_grad():
        torch.testing.assert_close(alone(x), torch.cat([alone(row) for row in x.split(1)]))
        assert not torch.allclose(shared(x), torch.cat([shared(row) for row in x.split(1)]))
    assert bool((shared.active(x) == shared.active(x)[0]).all())


def test_empty_sets() -> None:
    x = torch.randn(40, 12)
    slide = build(nogemm.SlideConfig, SETTINGS[2])
    empty = slide.active(x) == 0
    assert bool(empty.any())
    expected = slide.neurons.down.bias.expand(int(empty.sum()), -1)
    torch.testing.assert_close(slide(x)[empty], expected)
    assert int(build(nogemm.MongooseConfig, SETTINGS[2]).active(x).min()) >= 1


@both
def test_everything_retrieved_is_the_dense_layer(make: Any) -> None:
    source, x = dense(), torch.randn(30, 16)
    layer = make(bits=1, tables=64).build(16, hidden=64).eval()
    assert layer.fit_dense(source) == layer.fitted == "closed-form"
    assert int(layer.active(x).min()) == 64
    torch.testing.assert_close(layer(x), source(x))
    assert make(hidden=9).build(16, hidden=64).fit_activations(source, x) == "random"


@both
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.01), ("int8", 0.02)])
def test_packed(make: Any, settings: dict[str, Any], dtype: str, tolerance: float) -> None:
    layer = build(make, settings, gated=settings["bits"] == 3).requires_grad_(False)
    packed = layer.pack(dtype)
    for tokens in (0, 1, 7, 200):  # the last computes all neurons and masks
        x = torch.randn(tokens, 12)
        y, expected = packed(x), layer(x)
        assert y.shape == expected.shape
        assert float((y - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-3)
    if settings["bits"] < 9:
        assert float((packed(x.roll(1, 0)) - expected).norm()) > 5 * tolerance * float(expected.norm())
    torch.set_num_threads(1)
    one = packed(x)
    torch.set_num_threads(2)
    # All neurons are multiplied by torch here.
    assert float((packed(x) - one).norm()) <= tolerance * float(one.norm())


@both
def test_not_finite_tokens_stay_alone_in_their_chunk(make: Any) -> None:
    layer = build(make, {"bits": 3, "tables": 2, "chunk": 5})
    x = torch.randn(5, 12)
    for module in (layer, layer.pack("fp32")):
        broken = x.clone()
        broken[1, 0], broken[3] = float("nan"), float("inf")
        y = module(broken).detach()
        assert y[[1, 3]].isnan().all()
        keep = x[[0, 2, 4]]
        torch.testing.assert_close(y[[0, 2, 4]], module(keep).detach())


@both
def test_gradients_reach_retrieved_neurons_only(make: Any) -> None:
    layer = build(make, {"bits": 4, "tables": 1})
    if isinstance(layer, MongooseFFN):
        layer.config = nogemm.MongooseConfig(bits=4, tables=1, triplet_weight=0.0)
    x = torch.randn(3, 12)
    layer(x).square().sum().backward()
    touched = layer.retrieved(x).any(0)
    assert 0 < int(touched.sum()) < 37
    gradient = layer.neurons.down.weight.grad
    assert gradient is not None
    assert torch.equal(gradient.abs().sum(0) > 0, touched)


def test_state_holds_signs_and_tables() -> None:
    for make, held in ((nogemm.SlideConfig, {"planes"}), (nogemm.MongooseConfig, {"planes", "codes"})):
        assert held <= set(build(make, SETTINGS[0]).state_dict())


@both
def test_faithful_layers_drop_once_more(make: Any) -> None:
    x = torch.randn(50, 12)
    layer = make(bits=2, tables=4, faithful=True).build(12, hidden=37).train()
    dropped = float((layer(x) == 0).float().mean())
    assert dropped == pytest.approx(0.1, abs=0.04)
    torch.testing.assert_close(layer.eval()(x), layer(x))
    assert int((make(bits=2, tables=4).build(12, hidden=37).train()(x) == 0).sum()) == 0


@both
@pytest.mark.parametrize("gated", [False, True])
def test_faithful_start(make: Any, gated: bool) -> None:
    neurons = make(faithful=True).build(128, hidden=400, gated=gated).neurons
    for linear in (neurons.up, *([neurons.gate] if gated else [])):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.03)
        assert float(linear.weight.detach().abs().max()) > 0.06  # not uniform
        assert not bool(linear.bias.any())
    for parameter in neurons.down.parameters():
        assert float(parameter.detach().abs().max()) == pytest.approx(0.05, rel=0.05)
        assert float(parameter.detach().std()) == pytest.approx(0.05 / 3**0.5, rel=0.1)
    plain = make().build(128, hidden=400, gated=gated).neurons
    assert bool(plain.up.bias.any())


@both
def test_cost_expects_uniform_codes(make: Any) -> None:
    layer = make(bits=4, tables=3, chunk=8).build(64, hidden=512)
    assert layer.expected_active(1) == pytest.approx(512 * (1 - (15 / 16) ** 3))
    one, many = layer.cost(1), layer.cost(16)
    assert one.flops == pytest.approx(2 * 65 * 12 + 4 * 64 * layer.expected_active(1))
    assert many.flops == pytest.approx(16 * (2 * 65 * 12 + 4 * 64 * layer.expected_active(8)))
    assert one.bytes_read < many.bytes_read
    measured = float(layer.active(torch.randn(400, 64)).double().mean())
    assert measured == pytest.approx(layer.expected_active(8), rel=0.3)


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (nogemm.SlideConfig, {"bits": 17}, "SlideConfig.*1 to 16.*bits=17"),
        (nogemm.SlideConfig, {"tables": 0}, "tables=0"),
        (nogemm.SlideConfig, {"chunk": 0}, "chunk=0"),
        (nogemm.SlideConfig, {"activation": "tanh"}, "activation='tanh'"),
        (nogemm.MongooseConfig, {"hidden": 0}, "MongooseConfig.*hidden=0"),
        (nogemm.MongooseConfig, {"rebuild": -1}, "rebuild=-1"),
        (nogemm.MongooseConfig, {"triplet_weight": "x"}, "triplet_weight='x'"),
    ],
)
def test_values_out_of_range_are_named(make: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**values)


def test_types() -> None:
    assert isinstance(nogemm.SlideConfig().build(8), SlideFFN)
    assert isinstance(nogemm.MongooseConfig().build(8), MongooseFFN)
