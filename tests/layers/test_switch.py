"""Switch: routing, capacity, auxiliary losses, fits, the published form, packing, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F

import nogemm
from nogemm.errors import ConfigError
from nogemm.layers import DenseFFN, SwitchFFN
from nogemm.layers.switch.routing import choose_experts

CASES = [
    (nogemm.SwitchConfig(experts=4), 16, 16, 24, False),
    (nogemm.SwitchConfig(experts=3, norm=True, activation="silu"), 37, 20, 11, False),
    (nogemm.SwitchConfig(experts=5, hidden=7), 9, 30, 40, True),
    (nogemm.SwitchConfig(experts=1), 5, 5, 6, False),
    (nogemm.SwitchConfig(experts=2), 1, 1, 1, False),
]
cases = pytest.mark.parametrize(("config", "d_model", "d_out", "hidden", "gated"), CASES)


def build(config: nogemm.SwitchConfig, d_model: int, d_out: int, hidden: int, gated: bool) -> SwitchFFN:
    layer = config.build(d_model, d_out, hidden=hidden, gated=gated).eval()
    torch.nn.init.normal_(layer.router.weight)
    return layer


def dense(width: int = 24, hidden: int = 64) -> DenseFFN:
    up, down = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    return DenseFFN.from_weights(up, torch.randn(hidden) / 3, down, torch.randn(width) / 3)


@cases
def test_each_token_by_hand(config: nogemm.SwitchConfig, d_model: int, d_out: int, hidden: int, gated: bool) -> None:
    layer = build(config, d_model, d_out, hidden, gated).double()
    x = torch.randn(17, d_model, dtype=torch.float64)
    y = layer(x)
    for token, answer in zip(x, y, strict=True):
        v = token if layer.norm is None else token / math.sqrt(float(token.square().mean()) + 1e-6) * layer.norm.weight
        bias = layer.router.get_parameter("bias")
        logits = [float(w @ v + b) for w, b in zip(layer.router.weight, bias, strict=True)]
        best = max(range(len(logits)), key=lambda e: (logits[e], -e))
        gate = math.exp(logits[best]) / sum(math.exp(z) for z in logits)
        torch.testing.assert_close(answer, gate * layer.experts[best](v), rtol=1e-9, atol=1e-9)


def test_ties_go_to_the_first_expert_and_one_expert_may_take_all() -> None:
    layer = build(*CASES[0])
    torch.nn.init.zeros_(layer.router.weight)
    torch.nn.init.zeros_(layer.router.get_parameter("bias"))
    x = torch.randn(9, 16)
    assert layer.routing(x).expert_N.tolist() == [0] * 9
    torch.testing.assert_close(layer(x), layer.experts[0](x) / 4)


def test_capacity_keeps_the_first_tokens() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 1.0], [2.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert choose_experts(logits, 1.0).kept_N.tolist() == [True, True, True, True, False, True]  # three each
    assert choose_experts(logits, 0.1).kept_N.tolist() == [True, False, True, False, False, False]  # at least one
    assert choose_experts(logits, None).kept_N.all()
    layer = nogemm.SwitchConfig(experts=2, capacity=0.5).build(8, hidden=8)
    x = torch.randn(16, 8)
    kept = layer.routing(x).kept_N
    assert int((~kept).sum()) > 0
    assert not layer(x)[~kept].any()  # overflow passes through the residual
    assert layer.eval().routing(x).kept_N.all()
    limited = nogemm.SwitchConfig(experts=2, evaluation_capacity=0.5).build(8, hidden=8).eval().requires_grad_(False)
    torch.testing.assert_close(limited.pack()(x), limited(x))
    assert not limited.routing(x).kept_N.all()


def test_auxiliary_losses_by_hand() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    p = [[1 / (1 + math.exp(-2)), 0.0], [1 / (1 + math.exp(-1)), 0.0], [1 / (1 + math.exp(3)), 0.0]]
    first = sum(row[0] for row in p) / 3
    routing = choose_experts(logits, None)
    assert float(routing.balance_loss) == pytest.approx(2 * (2 / 3 * first + 1 / 3 * (1 - first)))
    z = [math.log(math.exp(a) + math.exp(b)) for a, b in logits.tolist()]
    assert float(routing.z_loss) == pytest.approx(sum(v * v for v in z) / 3)
    even = choose_experts(torch.eye(4).repeat(3, 1) * 5, None)
    assert float(even.balance_loss) == pytest.approx(1.0)


@pytest.mark.parametrize("training", [True, False])
def test_auxiliary_losses_join_every_gradient(training: bool) -> None:
    config = nogemm.SwitchConfig(experts=4, balance_weight=0.3, z_weight=0.2)
    layer = build(config, 12, 12, 16, False).double().train(training)
    plain = nogemm.SwitchConfig(experts=4, balance_weight=0.0, z_weight=0.0).build(12, hidden=16).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(20, 12, dtype=torch.float64)
    layer(x).square().mean().backward()
    routing = plain.routing(x)
    (plain(x).square().mean() + 0.3 * routing.balance_loss + 0.2 * routing.z_loss).backward()
    for mine, explicit in zip(layer.parameters(), plain.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, explicit.grad)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x))


def test_balance_loss_evens_out_the_experts() -> None:
    spread = []
    for weight in (0.0, 1.0):
        torch.manual_seed(3)
        layer = nogemm.SwitchConfig(experts=4, balance_weight=weight, z_weight=0.0).build(8, hidden=8)
        with torch.no_grad():
            layer.router.get_parameter("bias")[0] += 3.0  # everything crowds into one expert
        x = torch.randn(512, 8)
        optimiser = torch.optim.Adam(layer.router.parameters(), lr=0.05)
        for _ in range(60):
            optimiser.zero_grad()
            (0.0 * layer(x).sum()).backward()
            optimiser.step()
        spread.append(int(torch.bincount(layer.routing(x).expert_N, minlength=4).max()))
    assert spread[1] < 256 < spread[0]


def test_gradcheck() -> None:
    layer = build(*CASES[1]).double()
    x = torch.randn(4, 37, dtype=torch.float64, requires_grad=True)
    layer.config = nogemm.SwitchConfig(experts=3, norm=True, activation="silu", balance_weight=0.0, z_weight=0.0)
    assert torch.autograd.gradcheck(layer, (x,))


def test_upcycling_keeps_the_function() -> None:
    source, x = dense(), torch.randn(200, 24)
    layer = nogemm.SwitchConfig(experts=8).build(24, hidden=64)
    assert layer.fit_dense(source) == layer.fitted == "closed-form"
    error = (layer(x) - source(x)).norm() / source(x).norm()
    assert float(error.detach()) < 0.02
    assert len(layer.routing(x).expert_N.unique()) > 4  # experts can go their own ways
    for config in (nogemm.SwitchConfig(hidden=32), nogemm.SwitchConfig(norm=True), nogemm.SwitchConfig(faithful=True)):
        assert config.build(24, hidden=64).fit_dense(source) == "random"


def test_carving_beats_a_dense_layer_of_the_active_width() -> None:
    source = dense()
    centres = 1.5 * torch.randn(8, 24)
    x, fresh = (torch.randn(n, 24) + centres[torch.randint(8, (n,))] for n in (3000, 800))
    errors = []
    for config in (nogemm.SwitchConfig(experts=8, hidden=16), nogemm.DenseConfig(hidden=16)):
        layer = config.build(24, hidden=64).eval()
        assert layer.fit_activations(source, x) == "closed-form"
        errors.append(float((layer(fresh) - source(fresh)).square().mean().detach()))
    assert errors[0] < errors[1]
    wide = nogemm.SwitchConfig(experts=2, hidden=80).build(24, hidden=64).eval()
    wide.fit_activations(source, x)
    assert float((wide(fresh) - source(fresh)).norm().detach() / source(fresh).norm()) < 0.2
    few = nogemm.SwitchConfig(experts=8, hidden=16).build(24, hidden=64).eval()
    few.fit_activations(source, x[:3])  # fewer tokens than experts
    assert few(fresh).isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-6), ("bf16", 0.02), ("int8", 0.06)])
@cases
def test_packed(
    config: nogemm.SwitchConfig, d_model: int, d_out: int, hidden: int, gated: bool, dtype: str, tolerance: float
) -> None:
    layer = build(config, d_model, d_out, hidden, gated).requires_grad_(False)
    packed = layer.pack(dtype)
    for tokens in (0, 1, 7, 130):
        x = torch.randn(tokens, d_model)
        y, expected = packed(x), layer(x)
        assert y.shape == expected.shape
        assert float((y - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-3)
    if d_model > 1:
        assert float((packed(x.roll(1, 0)) - expected).norm()) > 5 * tolerance * float(expected.norm())


def test_not_finite_tokens_stay_alone() -> None:
    for case in CASES[1:3]:
        layer = build(*case)
        for module in (layer, layer.pack("fp32")):
            x = torch.randn(6, case[1])
            clean = module(x)
            x[1, 0], x[4] = float("nan"), float("inf")
            y = module(x)
            assert y[[1, 4]].isnan().all()
            torch.testing.assert_close(y[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_faithful_repeats_the_published_quirks() -> None:
    layer = nogemm.SwitchConfig(experts=4, faithful=True).build(16, hidden=24, activation="silu").eval()
    assert layer.router.bias is None
    expert = layer.experts[0]
    assert isinstance(expert, DenseFFN)
    assert expert.activation == "relu"
    assert expert.up.bias is None
    torch.nn.init.normal_(layer.router.weight)
    x = torch.randn(40, 16)
    with torch.no_grad():
        assert not torch.equal(layer(x), layer(x))  # jitter, in evaluation too
        packed = layer.pack("fp32")
        torch.testing.assert_close(packed(x), packed(x))  # none in packed form
        v = F.rms_norm(x, (16,), eps=1e-6)
        expected = torch.stack(
            [
                token + logits.softmax(0).max() * layer.experts[int(logits.argmax())](normed)
                for token, normed, logits in zip(x, v, v @ layer.router.weight.T, strict=True)
            ]
        )
    torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)  # the input comes on top
    layer.train()(x).sum().backward()
    assert layer.router.weight.grad is not None


def test_faithful_drops_hidden_activations_and_outputs() -> None:
    layer = nogemm.SwitchConfig(experts=1, faithful=True).build(16, hidden=400).train()
    added = layer(x := torch.randn(500, 16)) - x
    assert float((added == 0).float().mean()) == pytest.approx(0.1, abs=0.03)
    expert = layer.experts[0]
    assert isinstance(expert, DenseFFN)
    assert not torch.equal(expert(x), expert(x))
    torch.testing.assert_close(expert.eval()(x), expert(x))


def test_cost_of_the_papers_row() -> None:
    layer = nogemm.SwitchConfig(experts=8, hidden=1024, faithful=True).build(512)
    assert layer.cost(1).flops == 4 * 512 * 1024 + 2 * 512 * 8
    assert round(layer.cost(1).flops / 1e6, 2) == 2.11
    stored = sum(p.numel() for p in layer.parameters())
    assert layer.cost(1).parameters == stored == 8 * 2 * 512 * 1024 + 8 * 512 + 512
    assert layer.cost(1).bytes_read == 4 * (2 * 512 * 1024 + 8 * 512 + 512)
    assert layer.cost(1000).bytes_read == pytest.approx(4 * stored)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experts": 0}, "SwitchConfig.*experts=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"capacity": 0}, "capacity=0"),
        ({"evaluation_capacity": -1.0}, "evaluation_capacity=-1.0"),
        ({"capacity": 2.0, "faithful": True}, "faithful"),
        ({"balance_weight": -0.1}, "balance_weight=-0.1"),
        ({"z_weight": math.nan}, "z_weight=nan"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nogemm.SwitchConfig(**values)  # type: ignore[arg-type]


def test_faithful_needs_equal_widths() -> None:
    with pytest.raises(ConfigError, match=r"d_model=8.*d_out=9"):
        nogemm.SwitchConfig(faithful=True).build(8, 9)
