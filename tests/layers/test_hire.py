"""HireFFN: what is kept, how well the sketch finds it, fits from dense weights, training, odd inputs, cost."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nogemm
from nogemm.config import layer_config
from nogemm.errors import ConfigError
from nogemm.layers import DenseConfig, DenseFFN, HireConfig, HireFFN

# name, config, activation, gated
LAYERS = (
    ("relu", HireConfig(keep=0.1), "relu", False),
    ("relu2 int4", HireConfig(keep=0.1, sketch="int4"), "relu2", False),
    ("gelu", HireConfig(keep=0.2), "gelu", False),
    ("gelu groups", HireConfig(keep=0.2, group=4, static=6), "gelu_new", False),
    ("swiglu", HireConfig(keep=0.2, sketch="int4"), "silu", True),
    ("reglu static", HireConfig(keep=0.2, static=5), "relu", True),
    ("drelu", HireConfig(keep=0.1, activation="drelu"), "relu", True),
    ("quick gelu", HireConfig(keep=0.3), "quick_gelu", False),
    ("low rank", HireConfig(keep=0.2, sketch="low_rank", rank=24), "relu", False),
    ("statistical", HireConfig(keep=0.1, select="statistical"), "silu", True),
    ("active", HireConfig(keep=0.1, select="active", sketch="int4"), "relu", False),
    ("everything", HireConfig(keep=1.0), "gelu", False),
)
by_name = pytest.mark.parametrize(
    ("config", "activation", "gated"), [c[1:] for c in LAYERS], ids=[c[0] for c in LAYERS]
)


def build(config: HireConfig, activation: str, gated: bool, hidden: int = 103, d: int = 40) -> HireFFN:
    layer = config.build(d, 33, hidden=hidden, activation=activation, gated=gated)
    layer.fit_sketch()
    with torch.no_grad():
        for bias in (layer.up_bias, layer.gate_bias, layer.bias):
            if bias is not None:
                bias.normal_(std=0.3)
    return layer.eval()


def dense_twin(activation: str, gated: bool, hidden: int = 103, d: int = 40) -> DenseFFN:
    return DenseConfig().build(d, hidden=hidden, activation=activation, gated=gated).eval()


def test_hand_worked() -> None:
    layer = HireConfig(keep=0.5).build(2, 1, hidden=4, activation="relu").eval()
    with torch.no_grad():
        layer.up.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, -1.0]]))
        layer.down.copy_(torch.tensor([[1.0], [10.0], [100.0], [1000.0]]))
        layer.bias.fill_(0.5)
        # Pre-activations 1, 2, 3, -3: neurons 2 and 1 are kept.
        assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [[320.5]]
        # Neuron 3 alone fires; which other is kept makes no difference.
        assert layer(torch.tensor([[-1.0, -2.0]])).tolist() == [[3000.5]]


@by_name
def test_shapes_and_choices(config: HireConfig, activation: str, gated: bool) -> None:
    layer = build(config, activation, gated)
    x = torch.randn(2, 3, 40)
    assert layer(x).shape == (2, 3, 33)
    assert layer(x[:0]).shape == (0, 3, 33)
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x.transpose(0, 1).contiguous()))
    choice = layer.choose(x.reshape(-1, 40))
    computed, kept = choice.computed_NC, choice.kept_NK
    for index in (computed, kept):
        assert index.dtype == torch.int32
        assert int(index.max()) < 103
    real = [set(row[row >= 0].tolist()) for row in kept]
    assert all(a <= set(row[row >= 0].tolist()) for a, row in zip(real, computed, strict=True))
    if config.select == "topk" and config.group == 1:
        assert {len(row) for row in real} == {layer.kept}


@by_name
def test_sketch_finds_what_exact_arithmetic_keeps(config: HireConfig, activation: str, gated: bool) -> None:
    layer = build(config, activation, gated, hidden=512, d=128 if config.sketch != "low_rank" else 40)
    scale = torch.linspace(2, 0.05, layer.d_model) if config.sketch == "low_rank" else 1.0
    x = torch.randn(200, layer.d_model) * scale
    if config.sketch == "low_rank":
        layer.fit_sketch(x)
    report = layer.measure(x)
    assert report.recall >= (0.9 if config.sketch == "low_rank" else 0.985), report
    assert report.energy >= (0.9 if config.sketch == "low_rank" else 0.97), report
    assert report.kept <= report.computed + 1e-9


def test_recall_can_fail() -> None:
    layer = HireConfig(keep=0.05, sketch="low_rank", rank=2).build(64, hidden=512, activation="relu").eval()
    layer.fit_sketch()
    assert layer.measure(torch.randn(50, 64)).recall < 0.5


def test_whitening_helps_where_inputs_are_not_white() -> None:
    layer = HireConfig(keep=0.1, sketch="low_rank", rank=16).build(64, hidden=256, activation="relu").eval()
    x = torch.randn(2000, 64) * torch.logspace(0, -2, 64)[torch.randperm(64)]
    layer.fit_sketch()
    plain = layer.measure(x[:500]).recall
    layer.fit_sketch(x[500:])
    assert layer.measure(x[:500]).recall > plain + 0.1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu2", "gelu", "silu"])
def test_keeping_all_equals_dense(activation: str, gated: bool) -> None:
    dense = dense_twin(activation, gated)
    for config in (HireConfig(keep=1.0), HireConfig(keep=1.0, group=10), HireConfig(keep=1, select="statistical")):
        layer = config.build(40, hidden=103, activation=activation, gated=gated).eval()
        assert layer.fit_dense(dense) == "exact"
        x = torch.randn(9, 40)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_active_relu_neurons_are_the_dense_layer(activation: str, gated: bool) -> None:
    dense = dense_twin(activation, gated)
    for sketch in ("int8", "int4"):
        config = HireConfig(select="active", sketch=sketch)
        layer = config.build(40, hidden=103, activation=activation, gated=gated).eval()
        assert layer.fit_dense(dense) == "exact"
        x = torch.randn(200, 40)
        torch.testing.assert_close(layer(x), dense(x), rtol=1e-3, atol=1e-4)


def test_topk_of_a_sparse_relu_layer_is_the_dense_layer() -> None:
    dense = dense_twin("relu", False)
    with torch.no_grad():
        dense.up.bias.fill_(-1.2)  # few neurons fire
    layer = HireConfig(keep=0.3, sketch="int4").build(40, hidden=103, activation="relu").eval()
    assert layer.fit_dense(dense) == "closed-form"
    x = torch.randn(100, 40)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-4, atol=1e-5)


def test_other_shapes_are_left_alone() -> None:
    layer = HireConfig().build(40, hidden=100, activation="relu")
    before = copy.deepcopy(layer.state_dict())
    assert layer.fit_dense(dense_twin("relu", False)) == "random"
    assert layer.fit_dense(dense_twin("relu", True, hidden=100)) == "random"
    assert all(before[name].equal(value) for name, value in layer.state_dict().items())


def test_fit_to_activations_centres_the_error_and_finds_static_units() -> None:
    dense = dense_twin("gelu", False)
    hot = torch.tensor([7, 50, 99])
    with torch.no_grad():
        dense.up.bias[hot] += 6.0
    x = torch.randn(3000, 40)
    layer = HireConfig(keep=0.2, static=3).build(40, hidden=103, activation="gelu").eval()
    assert layer.fit_activations(dense, x) == "closed-form"
    assert layer.always.tolist() == hot.tolist()
    with torch.no_grad():
        offset = (layer(x) - dense(x)).mean(0).norm()
        layer.fit_dense(dense)
        assert offset < 0.1 * (layer(x) - dense(x)).mean(0).norm()


def test_static_units_are_always_kept() -> None:
    layer = build(HireConfig(keep=0.1, static=4), "relu", False)
    layer.always.copy_(torch.tensor([3, 20, 21, 90]))
    kept = layer.choose(torch.randn(50, 40)).kept_NK
    assert all({3, 20, 21, 90} <= set(row.tolist()) for row in kept)


@by_name
def test_training_steps_lower_the_loss_and_reach_kept_neurons_only(
    config: HireConfig, activation: str, gated: bool
) -> None:
    layer = build(config, activation, gated).train()
    x, target = torch.randn(64, 40), torch.randn(64, 33)
    kept = layer.choose(x[:1]).kept_NK
    layer(x[:1]).sum().backward()
    assert layer.down.grad is not None
    touched = layer.down.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert set(touched) <= set(kept[0].tolist())
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = F.mse_loss(layer(x), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@by_name
def test_training_form_is_the_evaluation_form(config: HireConfig, activation: str, gated: bool) -> None:
    layer = build(config, activation, gated)
    x = torch.randn(100, 40)
    with torch.no_grad():
        evaluated, trained = layer(x), layer.train()(x)
    far = (evaluated - trained).norm(dim=-1) > 1e-3 * trained.norm(dim=-1)
    # The sketch of a training layer is int8 with fewer candidates; then the tokens differ that miss a neuron.
    assert float(far.float().mean()) <= (0.35 if config.sketch == "int4" else 0.02)


def test_gradients_match_float64() -> None:
    layer = build(HireConfig(keep=0.3), "silu", True)
    x = torch.randn(17, 40)
    found = []
    for twin in (layer, copy.deepcopy(layer).double()):
        twin.zero_grad()
        leaf = x.clone().to(twin.up.dtype).requires_grad_()
        twin(leaf).square().sum().backward()
        found.append({"x": leaf.grad, **{name: p.grad for name, p in twin.named_parameters()}})
    for name, grad in found[0].items():
        assert grad is not None
        torch.testing.assert_close(grad.double(), found[1][name], rtol=1e-3, atol=1e-3, msg=name)


def test_the_sketch_follows_the_weights() -> None:
    for sketch in ("int8", "int4", "low_rank"):
        layer = HireConfig(keep=0.1, sketch=sketch, rank=40).build(40, hidden=200, activation="relu").eval()
        layer.fit_sketch()
        x = torch.randn(50, 40)
        assert layer.measure(x).recall > 0.95
        with torch.no_grad():
            layer.up.normal_()
        assert layer.measure(x).recall > 0.95, sketch
        loaded = HireConfig(keep=0.1, sketch=sketch, rank=40).build(40, hidden=200, activation="relu").eval()
        loaded.measure(x)
        loaded.load_state_dict(layer.state_dict())
        torch.testing.assert_close(loaded(x), layer(x))


def test_the_sketch_follows_an_optimiser_that_leaves_no_trace() -> None:
    layer = HireConfig(keep=0.1).build(40, hidden=200, activation="relu").eval()
    loaded, x = copy.deepcopy(layer), torch.randn(50, 40)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.05, fused=True)
    before = layer.up._version
    for _ in range(2):
        layer(x).square().sum().backward()
        optimiser.step()
    assert layer.up._version == before  # what makes the weights look as if nothing had happened
    loaded.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert layer.sketch().codes_FR.equal(loaded.sketch().codes_FR)
        torch.testing.assert_close(layer(x), loaded(x))
        torch.testing.assert_close(layer.pack()(x), loaded.pack()(x))


@pytest.mark.parametrize("select", ["topk", "statistical", "active"])
def test_odd_tokens(select: Any) -> None:
    layer = build(HireConfig(keep=0.1, select=select), "relu", False)
    x = torch.randn(8, 40)
    clean = layer(x)
    x[2, 3], x[5] = float("nan"), float("inf")
    got = layer(x)
    assert got[[2, 5]].isnan().all()
    keep = [0, 1, 3, 4, 6, 7]
    torch.testing.assert_close(got[keep], clean[keep])
    assert layer(torch.zeros(1, 40)).isfinite().all()


def test_ties_go_to_the_lowest_neuron() -> None:
    layer = HireConfig(keep=0.25).build(4, 4, hidden=16, activation="relu").eval()
    with torch.no_grad():
        layer.up.fill_(1.0)
    assert layer.choose(torch.ones(1, 4)).kept_NK.tolist() == [[0, 1, 2, 3]]
    assert layer.choose(torch.zeros(1, 4)).kept_NK.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("oversample", [1.0, 1.5, 9.9, 1e9])
@pytest.mark.parametrize("group", [1, 7, 200])
def test_any_number_of_candidates(oversample: float, group: int) -> None:
    layer = build(HireConfig(keep=0.3, oversample=oversample, group=group), "relu", False)
    x = torch.randn(5, 40)
    y = layer(x)
    assert y.isfinite().all()
    groups = -(-layer.hidden // group)
    if layer.candidates < groups:
        return
    # All are candidates: the strongest groups answer, by exact values.
    weight, bias = layer.selector
    keys = torch.relu(torch.nn.functional.linear(x, weight, bias))
    keys = torch.nn.functional.pad(keys, (0, -layer.hidden % group)).unflatten(1, (groups, group)).sum(-1)
    best = keys.topk(min(layer.kept, groups), dim=1).indices
    members = (best.unsqueeze(-1) * group + torch.arange(group)).flatten(1)
    members = torch.where(members < layer.hidden, members, -1).sort(1).values.to(torch.int32)
    torch.testing.assert_close(y, layer.at(x, members), rtol=1e-4, atol=1e-5)


def test_bad_configs_say_why() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.1}, "keep=1.1"),
        ({"keep": "x"}, "keep='x'"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"oversample": 0.5}, "oversample=0.5"),
        ({"sketch": "int2"}, "int8, int4, low_rank.*sketch='int2'"),
        ({"rank": 0}, "rank=0"),
        ({"group": 0}, "group=0"),
        ({"static": -1}, "static=-1"),
        ({"select": "active", "group": 2}, 'need select="topk"'),
        ({"activation": "tanh"}, "activation='tanh'"),
    ]
    for keywords, message in cases:
        with pytest.raises(ConfigError, match=message):
            HireConfig(**keywords)
    with pytest.raises(ConfigError, match="gated"):
        HireConfig(activation="drelu").build(8)
    with pytest.raises(ConfigError, match="ReLU-type"):
        HireConfig(select="active").build(8, activation="gelu")
    with pytest.raises(ConfigError, match=r"static=9.*keep=0\.1"):
        HireConfig(keep=0.1, static=9).build(8, hidden=32)


def test_config_round_trip_and_state() -> None:
    config = HireConfig(keep=0.2, sketch="low_rank", rank=5, group=2, static=4)
    assert layer_config(config.to_dict()) == config
    assert nogemm.HireConfig is HireConfig
    layer = config.build(12, hidden=40, activation="relu")
    assert {"always", "sketch_reduce", "sketch_lift"} <= set(layer.state_dict())


def test_cost_counts_what_is_done() -> None:
    layer = HireConfig(keep=0.05, sketch="int4", oversample=1.5).build(16, hidden=64, activation="relu")
    kept, candidates = 4, 6  # ceil(3.2), ceil(1.5 * 4)
    assert layer.cost(3).flops == 3 * (2 * 16 * 64 + 2 * 16 * candidates + 2 * 16 * kept)
    assert layer.cost(1).bytes_read == pytest.approx(16 * 64 / 2 + 4 * 16 * (5.77 + 3.91), rel=0.01)
    assert layer.cost(1).parameters == 2 * 16 * 64 + 64 + 16
    full = HireConfig(keep=1.0).build(16, hidden=64, activation="relu")
    assert full.cost(1).flops == 2 * 2 * 16 * 64
