"""LookupFFN: the equations, the paper's costs, initialisation, gradients, storage, bad input."""

import math
from typing import Any

import pytest
import torch

import nogemm
from nogemm.errors import ConfigError
from nogemm.layers import DenseFFN, LookupFFN
from nogemm.layers.lookup.fit import fit_tables
from nogemm.testing.cases import LOOKUP_CASES, LookupCase
from nogemm.testing.compare_model import check_same_tensors


def build(case: LookupCase) -> LookupFFN:
    layer = case.config.build(case.d_model, case.d_out)
    for parameter in layer.parameters():  # biases start at zero: make every parameter matter
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def naive(layer: LookupFFN, x: list[float]) -> list[float]:
    """Compute one token by loops straight from the equations, sharing no code with the layer."""
    config = layer.config
    v = torch.tensor(x, dtype=torch.float64)
    if layer.norm is not None:
        v = (v - v.mean()) / math.sqrt(float(v.var(correction=0)) + layer.norm.eps)
        v = v * layer.norm.weight.double() + layer.norm.bias.double()
    z = layer.projection.dense_matrix().double() @ v
    if layer.projection.bias is not None:
        z = z + layer.projection.bias.double()
    y = torch.zeros(layer.d_out, dtype=torch.float64) if layer.bias is None else layer.bias.double().clone()
    for t in range(config.tables):
        part = z[t * config.bits : (t + 1) * config.bits].tolist()
        scored = []
        for code in range(2**config.bits):
            signs = [1 if code >> (config.bits - 1 - j) & 1 else -1 for j in range(config.bits)]
            inner = sum(s * value for s, value in zip(signs, part, strict=True))
            p = math.prod(1 / (1 + math.exp(-2 * s * value)) for s, value in zip(signs, part, strict=True))
            scored.append((inner, code, inner * p if config.score == "gelu" else p))
        for _, code, score in sorted(scored, reverse=True)[: config.neighbours]:
            y += score * layer.stored_rows()[t, code].double()
    return y.tolist()


@pytest.mark.parametrize("case", [c for c in LOOKUP_CASES if c.config.bits <= 8], ids=lambda c: c.name)
def test_equations(case: LookupCase) -> None:
    layer = build(case).double()
    x = torch.randn(3, case.d_model, dtype=torch.float64)
    expected = torch.tensor([naive(layer, row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("d", "tables", "bits", "projection", "mflop"),
    [
        (512, 256, 8, nogemm.BHConfig(block=64), 1.38),
        (512, 128, 8, nogemm.BHConfig(block=64), 0.69),
        (768, 170, 9, nogemm.BHConfig(block=64), 1.39),
        (512, 128, 8, nogemm.DenseProjectionConfig(), 1.18),
        (512, 128, 8, nogemm.BHConfig(block=32), 0.43),
        (512, 128, 8, nogemm.BHConfig(block=16), 0.30),
        (512, 32, 8, nogemm.BHConfig(block=64), 0.31),
        (512, 64, 8, nogemm.BHConfig(block=64), 0.35),
        (512, 64, 4, nogemm.BHConfig(block=64), 0.35),
        (512, 20, 13, nogemm.BHConfig(block=64), 0.30),
        (512, 256, 4, nogemm.BHConfig(block=64), 0.82),
    ],
)
def test_cost_gives_the_papers_mflop(
    d: int, tables: int, bits: int, projection: nogemm.BHConfig | nogemm.DenseProjectionConfig, mflop: float
) -> None:
    with torch.device("meta"):  # the cost needs shapes only, and 20 x 13 would be 336 MB
        layer = nogemm.LookupConfig(tables=tables, bits=bits, projection=projection, init="reference").build(d)
    assert round(layer.cost(1).flops / 1e6, 2) == mflop


@pytest.mark.parametrize(
    ("tables", "bits", "projection", "hash_mflop", "gather_mflop"),
    [
        (128, 8, nogemm.DenseProjectionConfig(), 1.05, 0.13),
        (128, 8, nogemm.BHConfig(block=64), 0.56, 0.13),
        (128, 8, nogemm.BHConfig(block=32), 0.30, 0.13),
        (128, 8, nogemm.BHConfig(block=16), 0.17, 0.13),
        (64, 4, nogemm.BHConfig(block=64), 0.28, 0.07),
        (32, 8, nogemm.BHConfig(block=64), 0.28, 0.03),
        (20, 13, nogemm.BHConfig(block=64), 0.28, 0.02),
    ],
)
def test_cost_of_hash_and_gather_apart(
    tables: int,
    bits: int,
    projection: nogemm.BHConfig | nogemm.DenseProjectionConfig,
    hash_mflop: float,
    gather_mflop: float,
) -> None:
    """Table 3 of the paper counts the two steps in columns of their own."""
    with torch.device("meta"):
        layer = nogemm.LookupConfig(tables=tables, bits=bits, projection=projection, init="reference").build(512)
    hashing = layer.projection.cost(4).flops
    assert round(hashing / 1e6, 2) == hash_mflop
    assert round((layer.cost(1).flops - hashing) / 1e6, 2) == gather_mflop


@pytest.mark.parametrize(("d", "hidden", "mflop"), [(512, 2048, 4.19), (768, 3072, 9.44)])
def test_cost_of_the_dense_baselines(d: int, hidden: int, mflop: float) -> None:
    layer = nogemm.DenseConfig(hidden=hidden).build(d)
    assert round(layer.cost(1).flops / 1e6, 2) == mflop
    assert layer.cost(1).bytes_read == 4 * (2 * d * hidden + d + hidden)


def test_cost_counts_bytes_and_parameters() -> None:
    layer = nogemm.LookupConfig(tables=64, bits=8).build(384)
    stored = sum(p.numel() for p in layer.parameters())
    small = 64 * 8 * 64 * 4 + 512 + 3 * 384  # blocks, projection bias, norm and output bias
    assert layer.cost(1).parameters == stored == small + 64 * 256 * 384
    assert layer.cost(1).bytes_read == 4 * (small + 64 * 384)
    rows = 256 * (1 - (255 / 256) ** 100)
    assert layer.cost(100).bytes_read == pytest.approx(4 * (small + 64 * rows * 384))
    layer.compress("int8")
    assert layer.cost(1).bytes_read == 4 * small + 64 * (384 + 4)


PROJECTIONS = (nogemm.BHConfig(), nogemm.BHConfig(residual=0.7), nogemm.DenseProjectionConfig())


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize(("tables", "bits"), [(128, 8), (20, 12), (200, 3)])
def test_initial_scale_is_independent_of_the_shape(
    tables: int, bits: int, projection: nogemm.BHConfig | nogemm.DenseProjectionConfig
) -> None:
    layer = nogemm.LookupConfig(tables=tables, bits=bits, projection=projection).build(384)
    assert float(layer(torch.randn(512, 384)).std()) == pytest.approx(0.14, rel=0.15)


def test_reference_initialisation_has_the_published_scale() -> None:
    layer = nogemm.LookupConfig(tables=128, bits=8, projection=nogemm.BHConfig(residual=0.7), init="reference").build(
        512
    )
    x = torch.randn(512, 512)
    assert layer.norm is not None
    assert float(layer.projection(layer.norm(x)).std()) == pytest.approx(0.76, rel=0.05)
    assert float(layer(x).std()) == pytest.approx(0.142, rel=0.1)


CASES_WITH_ALL_PARTS = [c for c in LOOKUP_CASES if c.name in ("repeats", "residual", "dense")]


@pytest.mark.parametrize("case", CASES_WITH_ALL_PARTS, ids=lambda c: c.name)
def test_gradients_reach_everything(case: LookupCase) -> None:
    layer = build(case)
    wide = build(case).double()
    wide.load_state_dict(layer.state_dict())
    x = torch.randn(6, case.d_model, requires_grad=True)
    x_wide = x.detach().double().requires_grad_()
    layer(x).square().sum().backward()
    wide(x_wide).square().sum().backward()
    pairs = [(x, x_wide), *zip(layer.parameters(), wide.parameters(), strict=True)]
    for parameter, exact in pairs:
        assert parameter.grad is not None
        assert exact.grad is not None
        assert bool(exact.grad.any())
        error = (parameter.grad - exact.grad).norm() / exact.grad.norm()
        assert float(error) < 1e-4


def test_fit_tables_solves_the_least_squares() -> None:
    layer = nogemm.LookupConfig(tables=3, bits=3, projection=nogemm.BHConfig(block=8)).build(8, 5)
    teacher = nogemm.LookupConfig(tables=3, bits=3, projection=nogemm.BHConfig(block=8)).build(8, 5)
    teacher.load_state_dict({**layer.state_dict(), "tables": torch.randn(3, 8, 5), "bias": torch.randn(5)})
    x = torch.randn(4000, 8)
    unexplained = fit_tables(layer, x, teacher(x).detach(), iterations=100, ridge=1e-7, tol=1e-6)
    assert unexplained < 1e-4
    torch.testing.assert_close(layer(x), teacher(x), rtol=0, atol=0.05)
    noise = torch.randn(4000, 5)
    assert fit_tables(layer, x, noise) > 0.9  # nothing to learn: must not claim otherwise


def test_fit_activations_beats_the_start() -> None:
    dense = DenseFFN.from_weights(torch.randn(64, 16) / 4, None, torch.randn(16, 64) / 8, torch.randn(16))
    layer = nogemm.LookupConfig(tables=16, bits=5, projection=nogemm.BHConfig(block=16)).build(16)
    x = torch.randn(2000, 16)
    assert layer.fit_activations(dense, x) == layer.fitted == "closed-form"
    target = dense(x)
    assert float((layer(x) - target).square().mean()) < 0.5 * float(target.var())


@pytest.mark.parametrize(("storage", "error"), [("bf16", 2**-8), ("int8", 1 / 127)])
def test_compress_and_back(storage: str, error: float) -> None:
    layer = nogemm.LookupConfig(tables=8, bits=5, projection=nogemm.BHConfig(block=16)).build(32).eval()
    x = torch.randn(50, 32)
    before, rows = layer(x), layer.tables.detach().clone()
    layer.compress(storage)
    assert "tables" not in dict(layer.named_parameters())
    compressed = layer(x)
    rebuilt = layer.config.build(32).eval()
    rebuilt.load_state_dict(layer.state_dict())
    check_same_tensors("rebuilt", rebuilt, layer)
    torch.testing.assert_close(rebuilt(x), compressed)
    with pytest.raises(ConfigError, match=f"{storage} already"):
        layer.compress("int8")
    layer.decompress()
    assert bool(((layer.tables - rows).abs() <= error * rows.abs().amax(-1, keepdim=True)).all())
    torch.testing.assert_close(layer(x), compressed)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=20 * error * float(rows.abs().max()))
    assert layer.table_parameters()[0].requires_grad


def test_not_finite_tokens_stay_alone() -> None:
    for case in LOOKUP_CASES:
        layer = build(case)
        x = torch.randn(4, case.d_model)
        clean = layer(x)
        x[1, 0], x[2, -1] = float("nan"), float("inf")
        y = layer(x)
        assert y[1].isnan().all(), case.name
        assert y[2].isnan().all(), case.name
        torch.testing.assert_close(y[[0, 3]], clean[[0, 3]])


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_a_layer_built_with_compressed_tables_has_no_stray_memory(storage: Any) -> None:
    """Its tables start at zero, and what stands around them as in any other layer: never what lay in memory before."""
    config = nogemm.LookupConfig(tables=4, bits=3, storage=storage, projection=nogemm.BHConfig(block=8))
    layers = []
    for value in (1e30, float("nan")):
        before = [torch.full((size,), value) for size in range(1, 600)]
        del before
        torch.manual_seed(0)
        layers.append(config.build(16, 12).eval())
    first, second = layers
    check_same_tensors(storage, second, first)
    assert not first(torch.randn(5, 16)).any()
