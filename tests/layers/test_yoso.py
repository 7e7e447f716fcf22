"""YOSO: the sum over colliding neurons, its expectation, gradients, fits, the published form, packing, bad input."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

import nogemm
from nogemm.errors import ConfigError
from nogemm.layers import DenseFFN, YosoFFN
from nogemm.layers.yoso.fit import collision_shares
from nogemm.layers.yoso.packed import PackedYoso
from nogemm.projections import DiagonalChain
from nogemm.testing.compare import check_equal

CASES = [
    (nogemm.YosoConfig(hashes=16, bits=5), 32, 24, 50),
    (nogemm.YosoConfig(hashes=9, bits=4), 37, 37, 11),
    (nogemm.YosoConfig(hashes=70, bits=3, norm=False), 8, 5, 20),
    (nogemm.YosoConfig(hashes=1, bits=1), 1, 1, 1),
    (nogemm.YosoConfig(hashes=12, bits=6, unit=True, gain=True), 20, 33, 64),
    (nogemm.YosoConfig(hashes=5, bits=10), 24, 7, 300),
]
cases = pytest.mark.parametrize(("config", "d_model", "d_out", "hidden"), CASES)


def build(config: nogemm.YosoConfig, d_model: int, d_out: int, hidden: int) -> YosoFFN:
    layer = config.build(d_model, d_out, hidden=hidden).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def written_out(layer: YosoFFN, x: torch.Tensor) -> torch.Tensor:
    """Compute the sample neuron by neuron from the definition: count equal codes, weigh the values."""
    config = layer.config
    q = x if layer.norm is None else layer.norm(x)
    assert isinstance(layer.hash, DiagonalChain)
    width, groups = layer.hash.width, layer.hash.width // config.bits
    signs = layer.hash.weight.view(layer.hash.repeats, 3, width)

    def codes(v: torch.Tensor) -> torch.Tensor:
        out = []
        for t in range(config.hashes):
            w = F.pad(v, (0, width - v.shape[1]))
            for diagonal in signs[t // groups]:
                w = nogemm.ops.hadamard(w * diagonal)
            first = t % groups * config.bits
            out.append((w[:, first : first + config.bits] > 0).long())
        return torch.stack(out, 1)  # [., T, K]

    same = (codes(q).unsqueeze(1) == codes(layer.keys).unsqueeze(0)).all(-1).to(x.dtype).mean(-1)
    y = same @ layer.values
    y = F.normalize(y, dim=-1) if layer.unit else y
    return (y if layer.gain is None else y * layer.gain) + layer.bias


@cases
def test_evaluation_is_the_written_out_sample(config: nogemm.YosoConfig, d_model: int, d_out: int, hidden: int) -> None:
    layer = build(config, d_model, d_out, hidden).double()
    x = torch.randn(13, d_model, dtype=torch.float64)
    torch.testing.assert_close(layer(x), written_out(layer, x), rtol=1e-9, atol=1e-9)


def test_tables_are_built_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(*CASES[0])
    x = torch.randn(9, 32)
    whole = layer(x)
    monkeypatch.setattr("nogemm.layers.yoso.layer.TABLE_NUMBERS", 3 * 32 * 24)
    torch.testing.assert_close(layer(x), whole)


def test_expectation_by_hand() -> None:
    layer = nogemm.YosoConfig(hashes=4, bits=3, norm=False).build(3, 1, hidden=2).train()
    with torch.no_grad():
        layer.keys.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 5.0, 0.0]]))
        layer.values.copy_(torch.tensor([[2.0], [3.0]]))
        layer.bias.zero_()
    # 60 degrees from the first key, 30 from the second.
    x = torch.tensor([[0.5, math.sqrt(0.75), 0.0]])
    assert layer(x).item() == pytest.approx(2 * (1 - 60 / 180) ** 3 + 3 * (1 - 30 / 180) ** 3, rel=1e-5)


def test_the_sample_approaches_the_expectation() -> None:
    errors = []
    for hashes in (64, 4096):
        layer = nogemm.YosoConfig(hashes=hashes, bits=3).build(128, 16, hidden=64)
        torch.nn.init.normal_(layer.values)
        x = torch.randn(64, 128)
        with torch.no_grad():
            expected, sampled = layer.train()(x), layer.eval()(x)
        errors.append(float((sampled - expected).norm() / expected.norm()))
    assert errors[1] < 0.06
    assert errors[0] / errors[1] == pytest.approx(8.0, rel=0.5)  # 1 / sqrt(hashes)


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training: bool) -> None:
    layer = build(*CASES[0]).double().train(training)
    x = torch.randn(7, 32, dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, 24, dtype=torch.float64)
    (layer(x) * g).sum().backward()
    assert x.grad is not None
    assert layer.keys.grad is not None
    assert layer.values.grad is not None
    got = [x.grad.clone(), layer.keys.grad.clone(), layer.values.grad.clone()]
    layer.zero_grad()
    x.grad = None
    (layer.train()(x) * g).sum().backward()
    # Keys and inputs always follow the expectation; in evaluation the values follow the sample.
    torch.testing.assert_close(got[0], x.grad)
    torch.testing.assert_close(got[1], layer.keys.grad)
    q = x if layer.norm is None else layer.norm(x)
    expected = layer.values.grad if training else collision_shares(layer, q).T @ g
    torch.testing.assert_close(got[2], expected)


def test_training_form_passes_gradcheck() -> None:
    layer = nogemm.YosoConfig(hashes=4, bits=3).build(5, 3, hidden=6).double().train()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_training_in_evaluation_mode_lowers_the_loss() -> None:
    layer = nogemm.YosoConfig(hashes=64, bits=3).build(16, hidden=64).eval()
    x = torch.randn(256, 16)
    target = (x @ torch.randn(16, 16) / 4).relu()
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_fits_from_dense_weights() -> None:
    dense = DenseFFN.from_weights(
        torch.randn(96, 32) / 6, torch.randn(96) / 3, torch.randn(32, 96) / 9, torch.randn(32)
    )
    x, fresh = torch.randn(2000, 32), torch.randn(500, 32)
    target = dense(fresh).detach()

    def unexplained(layer: YosoFFN) -> float:
        with torch.no_grad():
            return float((layer.eval()(fresh) - target).square().sum() / (target - target.mean(0)).square().sum())

    by_weights, by_data = (nogemm.YosoConfig(hashes=128, bits=4).build(32, hidden=96) for _ in range(2))
    assert by_weights.fit_dense(dense) == by_weights.fitted == "closed-form"
    assert by_data.fit_activations(dense, x) == "closed-form"
    assert unexplained(by_weights) < 0.75
    assert unexplained(by_data) < 0.6
    narrow = nogemm.YosoConfig(hashes=64, bits=4, hidden=40).build(32)
    assert narrow.fit_dense(dense) == "random"  # neurons must correspond
    assert narrow.fit_activations(dense, x) == "closed-form"
    assert nogemm.YosoConfig(faithful=True).build(32, hidden=96).fit_activations(dense, x) == "random"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 0.01), ("int8", 0.02)])
@cases
def test_packed(
    config: nogemm.YosoConfig,
    d_model: int,
    d_out: int,
    hidden: int,
    dtype: str,
    tolerance: float,
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nogemm.layers.yoso.packed.native_available", lambda: native)
    layer = build(config, d_model, d_out, hidden).requires_grad_(False)
    packed = layer.pack(dtype)
    assert isinstance(packed, PackedYoso)
    assert packed.native == native
    for tokens in (0, 1, 7, 130):
        x = torch.randn(tokens, d_model)
        y, expected = packed(x), layer(x)
        assert y.shape == expected.shape
        assert far(layer, y, expected, tolerance) <= (FLIPS[dtype] if native else 0.0) * tokens + 1e-9
    assert not any("tables" in name or "packed" in name for name in packed.state_dict())
    if d_out > 1:  # other tokens' answers would be noticed
        assert far(layer, packed(x.roll(1, 0)), expected, tolerance) > 100


# Largest share of tokens one of whose bits is so near zero that hashing in 16 bits gives it the other sign.
FLIPS = {"fp32": 0.0, "bf16": 0.1, "int8": 0.1}


def far(layer: YosoFFN, y: torch.Tensor, expected: torch.Tensor, tolerance: float) -> int:
    """Count the tokens that differ by more than `tolerance` of a typical token's answer."""
    if not len(y):
        return 0
    size = float((expected - layer.bias).norm(dim=-1).square().mean().sqrt().clamp_min(1e-3))
    return int(((y - expected).norm(dim=-1) > 3 * tolerance * size).sum())


@pytest.mark.parametrize(
    "projection",
    [
        nogemm.BHConfig(rounds=2, block=8),
        nogemm.BHConfig(rounds=2, block=8, residual=0.7),
        nogemm.DenseProjectionConfig(),
        nogemm.HadamardChainConfig(depth=2),
        nogemm.AcdcConfig(depth=2),
    ],
    ids=lambda p: p.kind,
)
def test_projections_that_the_kernel_knows_run_in_one_call(
    isa: str, projection: nogemm.config.ProjectionConfig
) -> None:
    layer = build(nogemm.YosoConfig(hashes=11, bits=5, projection=projection), 40, 24, 50).requires_grad_(False)
    x = torch.randn(200, 40)
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 0.01), ("int8", 0.02)):
        packed = layer.pack(dtype)
        assert isinstance(packed, PackedYoso)
        assert packed.native == (projection.kind != "acdc")
        assert far(layer, packed(x), layer(x), tolerance) <= 200 * (0.005 if dtype == "fp32" else 0.15)
        assert far(layer, packed(x.roll(1, 0)), layer(x), tolerance) > 150


def test_a_token_of_zeros_has_the_codes_of_zero() -> None:
    layer = build(nogemm.YosoConfig(hashes=9, bits=4, norm=False), 12, 6, 30).requires_grad_(False)
    x = torch.zeros(3, 12)
    torch.testing.assert_close(layer.pack()(x), layer(x))


def test_packed_gives_equal_bits_one_by_one(isa: str) -> None:
    packed, x = build(*CASES[0]).pack("int8"), torch.randn(200, 32)
    check_equal("one by one", torch.cat([packed(row) for row in x.split(1)]), packed(x))


def test_not_finite_tokens_stay_alone() -> None:
    for config, d_model, d_out, hidden in CASES:
        if d_model < 2:
            continue
        layer = build(config, d_model, d_out, hidden)
        for module in (layer, layer.pack("fp32")):
            x = torch.randn(5, d_model)
            clean = module(x)
            x[1, 0], x[3] = float("nan"), float("inf")
            y = module(x)
            assert y[[1, 3]].isnan().all()
            torch.testing.assert_close(y[[0, 2, 4]], clean[[0, 2, 4]])


def test_faithful_draws_signs_anew_and_has_unit_length() -> None:
    layer = nogemm.YosoConfig(hashes=8, bits=4, faithful=True).build(16, hidden=40).eval()
    x = torch.randn(30, 16)
    with torch.no_grad():
        first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.testing.assert_close((first - layer.bias).norm(dim=-1), torch.ones(30))
    packed = layer.pack()
    torch.testing.assert_close(packed(x), packed(x))


def test_faithful_gradient_comes_from_colliding_neurons_only() -> None:
    layer = nogemm.YosoConfig(hashes=2, bits=8, faithful=True).build(16, hidden=400).train()
    layer(torch.randn(1, 16)).sum().backward()
    assert layer.keys.grad is not None
    assert layer.values.grad is not None
    touched = layer.keys.grad.abs().sum(1) > 0
    assert 0 < int(touched.sum()) < 100
    assert torch.equal(touched, layer.values.grad.abs().sum(1) > 0)


def test_cost_of_the_papers_row() -> None:
    layer = nogemm.YosoConfig(hashes=256, bits=10).build(512, hidden=2048)
    assert layer.cost(1).flops == 2 * 256 * 512 + 6 * 3 * 512 * 9
    assert round(layer.cost(1).flops / 1e6, 2) == 0.35
    small = 3 * 512 + 6 * 3 * 512  # norm, bias, signs
    assert layer.cost(1).bytes_read == 4 * (256 * 512 + small)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hashes": 0}, "YosoConfig.*hashes=0"),
        ({"bits": 17}, "1 to 16.*bits=17"),
        ({"hidden": 0}, "hidden=0"),
        ({"gain": True, "faithful": True}, "gain"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nogemm.YosoConfig(**values)  # type: ignore[arg-type]


def test_more_bits_than_width() -> None:
    with pytest.raises(ConfigError, match=r"bits=9.*d_model=5"):
        nogemm.YosoConfig(bits=9).build(5)


def test_unpacked_and_packed_compile(compiler: str) -> None:
    layer = build(*CASES[0])
    packed = copy.deepcopy(layer).requires_grad_(False).pack()
    x = torch.randn(6, 32)
    torch.testing.assert_close(torch.compile(packed, fullgraph=True, backend=compiler)(x), packed(x))
