"""Channel shuffle: the written-out product, odd widths, fits, the published form, packing, bad input."""

import pytest
import torch
import torch.nn.functional as F

import nogemm
from nogemm.errors import ConfigError
from nogemm.layers import DenseFFN, ShuffleFFN

CASES = [
    (nogemm.ShuffleConfig(block=8), 32, 32, 64),
    (nogemm.ShuffleConfig(block=16, norm=False), 37, 21, 50),
    (nogemm.ShuffleConfig(block=4, activation="relu"), 10, 3, 7),
    (nogemm.ShuffleConfig(block=12), 12, 40, 30),
    (nogemm.ShuffleConfig(block=1), 1, 1, 1),
]
cases = pytest.mark.parametrize(("config", "d_model", "d_out", "hidden"), CASES)


def build(config: nogemm.ShuffleConfig, d_model: int, d_out: int, hidden: int) -> ShuffleFFN:
    layer = config.build(d_model, d_out, hidden=hidden).eval()
    for parameter in layer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return layer


@cases
def test_written_out(config: nogemm.ShuffleConfig, d_model: int, d_out: int, hidden: int) -> None:
    layer = build(config, d_model, d_out, hidden).double()
    x = torch.randn(9, d_model, dtype=torch.float64)
    v = x if layer.norm is None else layer.norm(x)
    groups, width, block = layer.up.shape
    channels: dict[int, torch.Tensor] = {}
    for g in range(groups):
        piece = v[:, g * block : (g + 1) * block]
        for j in range(width):
            channels[j * groups + g] = piece @ layer.up[g, j, : piece.shape[1]]
    u = torch.stack([channels[i] for i in range(groups * width)], 1) + layer.up_bias
    h = F.relu(u) if layer.activation == "relu" else F.gelu(u)
    out = torch.cat([h[:, g * width : (g + 1) * width] @ layer.down[g].T for g in range(groups)], 1)
    torch.testing.assert_close(layer(x), out[:, :d_out] + layer.bias, rtol=1e-9, atol=1e-9)


def test_every_later_group_hears_of_every_earlier_one() -> None:
    layer = build(*CASES[0])
    x = torch.randn(1, 32, requires_grad=True)
    layer.norm = None
    layer(x)[0, :8].sum().backward()  # the outputs of one group
    assert x.grad is not None
    assert bool((x.grad.view(4, 8).abs().sum(1) > 0).all())


@pytest.mark.parametrize("gated", [False, True])
def test_fit_to_activations(gated: bool) -> None:
    gate = torch.randn(96, 24) / 5 if gated else None
    up, down = torch.randn(96, 24) / 5, torch.randn(24, 96) / 10
    source = DenseFFN.from_weights(up, torch.randn(96) / 3, down, torch.randn(24), gate)
    x, fresh = torch.randn(3000, 24), torch.randn(500, 24)
    layer = nogemm.ShuffleConfig(block=12).build(24, hidden=96).eval()
    assert layer.fit_dense(source) == "random"
    assert layer.fit_activations(source, x) == layer.fitted == "closed-form"
    target = source(fresh).detach()
    unexplained = (layer(fresh) - target).square().sum() / (target - target.mean(0)).square().sum()
    assert float(unexplained.detach()) < (0.95 if gated else 0.5)


def test_fit_when_a_group_has_no_output_of_its_own() -> None:
    source = DenseFFN.from_weights(torch.randn(7, 10), None, torch.randn(3, 7), None)
    layer = build(*CASES[2])
    layer.fit_activations(source, torch.randn(200, 10))
    assert layer(torch.randn(5, 10)).isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.02), ("int8", 0.06)])
@cases
def test_packed(
    isa: str, config: nogemm.ShuffleConfig, d_model: int, d_out: int, hidden: int, dtype: str, tolerance: float
) -> None:
    layer = build(config, d_model, d_out, hidden).requires_grad_(False)
    packed = layer.pack(dtype)
    for tokens in (0, 1, 7, 130):
        x = torch.randn(tokens, d_model)
        y, expected = packed(x), layer(x)
        assert y.shape == expected.shape
        assert float((y - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-3)
    if d_model > 1:
        assert float((packed(x.roll(1, 0)) - expected).norm()) > 5 * tolerance * float(expected.norm())
    torch.set_num_threads(1)
    one = packed(x)
    torch.set_num_threads(2)
    assert float((packed(x) - one).norm()) <= tolerance * float(one.norm())


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_tokens_stay_alone(broken: float) -> None:
    for case in CASES[1:4]:
        layer = build(*case)
        for module in (layer, layer.pack("fp32"), layer.pack("bf16"), layer.pack("int8")):
            x = torch.randn(5, case[1])
            x[2] = 0.0
            clean = module(x)
            x[2, -1] = broken
            y = module(x)
            assert y[2].isnan().all()
            torch.testing.assert_close(y[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_faithful_has_no_norm_and_the_published_scale() -> None:
    layer = nogemm.ShuffleConfig(block=128, faithful=True).build(512, hidden=1024, activation="relu")
    assert layer.norm is None
    assert layer.activation == "gelu"
    assert float(layer.up.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert nogemm.ShuffleConfig(block=8).build(32).norm is not None


def test_cost_of_the_papers_row() -> None:
    layer = nogemm.ShuffleConfig(block=256, faithful=True).build(512, hidden=2048)
    assert layer.cost(1).flops == 4 * 2048 * 256
    assert round(layer.cost(1).flops / 1e6, 2) == 2.10
    stored = sum(p.numel() for p in layer.parameters())
    assert layer.cost(3).parameters == stored == 2 * 2048 * 256 + 2048 + 512
    assert layer.cost(3).bytes_read == 4 * stored


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block": 0}, "ShuffleConfig.*block=0"),
        ({"hidden": 0}, "hidden=0"),
        ({"activation": "tanh"}, "activation='tanh'"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nogemm.ShuffleConfig(**values)  # type: ignore[arg-type]


def test_widths_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"block=64.*d_model=20"):
        nogemm.ShuffleConfig().build(20)
    with pytest.raises(ConfigError, match=r"faithful=True.*block=8, d_model=20, hidden=80"):
        nogemm.ShuffleConfig(block=8, faithful=True).build(20)
