"""Flip rates: none where arithmetic is exact, many where the router is another, and read off any packed layer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nogemm.bench.flips import FlipCase, compare_bits, flip_rate, read_bits, run_flips_bench
from nogemm.bench.report.tables import flips_table
from nogemm.layers import LookupConfig, LookupFFN, TreeConfig, TreeFFN
from nogemm.projections import BHConfig, DenseProjectionConfig

SMALL = LookupConfig(tables=12, bits=5, projection=BHConfig(block=8))
TREE = TreeConfig(trees=2, depth=4)


def build(config: LookupConfig | TreeConfig, d: int = 24) -> LookupFFN | TreeFFN:
    layer = config.build(d).eval().requires_grad_(False)
    for name, value in layer.named_parameters():
        if "bias" in name or name == "threshold":
            torch.nn.init.normal_(value, std=0.2)
    return layer


def shares(layer: LookupFFN | TreeFFN, found: Tensor, x: Tensor) -> dict[str, float]:
    values = build_exact(layer).decisions(x.double())
    return compare_bits(found, values > 0, values, path=layer.in_turn)


def bits_of(layer: LookupFFN | TreeFFN, dtype: str, x: Tensor, batch: int) -> Tensor:
    return read_bits(layer, layer.pack(dtype), x, batch)


def build_exact(layer: LookupFFN | TreeFFN) -> LookupFFN | TreeFFN:
    twin = build(layer.config, layer.d_model)
    twin.load_state_dict(layer.state_dict())
    return twin.double()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("batch", [1, 33])
def test_no_bit_flips_where_sums_are_exact_and_never_zero(isa: str, dtype: str, batch: int) -> None:
    config = LookupConfig(tables=3, bits=4, projection=DenseProjectionConfig(), norm=False)
    layer = config.build(15).eval().requires_grad_(False)
    assert isinstance(layer, LookupFFN)
    layer.projection.weight.copy_(torch.randint(0, 2, layer.projection.weight.shape) * 2 - 1)
    assert layer.projection.bias is not None
    torch.nn.init.zeros_(layer.projection.bias)
    x = torch.randint(0, 4, (33, 15)) * 2.0 - 3.0  # fifteen odd numbers have an odd sum
    found = shares(layer, bits_of(layer, dtype, x, batch), x)
    assert found["bits"] == 33 * 12
    assert (found["bits_differ"], found["tokens_differ"], found["widest"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, neighbours=2, score="sigmoid"), TREE], ids=["lookup", "neighbours", "tree"]
)
def test_what_is_read_is_what_was_decided(isa: str, config: LookupConfig | TreeConfig) -> None:
    layer, x = build(config), torch.randn(200, 24)
    assert shares(layer, bits_of(layer, "fp32", x, 200), x)["tokens_differ"] <= 1 / 200
    assert shares(layer, bits_of(layer, "int8", x, 7), x)["bits_differ"] < 0.03


@pytest.mark.parametrize("batch", [1, 3, 40, 1100])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_those_of_the_unpacked_layer(isa: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    for config in (SMALL, replace(SMALL, neighbours=2), replace(TREE, branch="bias", core=3)):
        layer, x = build(config), torch.randn(1100, 24)
        rows = torch.cat([layer.pack("fp32").route(part).rows for part in x.split(batch)])
        assert rows.dtype == torch.int32
        assert float((rows != layer.route(x).rows).any(1).double().mean()) <= 2 / 1100


@pytest.mark.parametrize("config", [SMALL, TREE], ids=lambda c: c.kind)
def test_another_router_would_be_noticed(config: LookupConfig | TreeConfig) -> None:
    layer, other, x = build(config), build(config), torch.randn(500, 24)
    other.load_state_dict(layer.state_dict())
    weight = other.projection.weight if isinstance(other, LookupFFN) else other.weight_in
    weight.mul_(1 + 0.01 * torch.randn(weight.shape))
    right = shares(layer, bits_of(layer, "fp32", x, 500), x)
    wrong = shares(layer, bits_of(other, "fp32", x, 500), x)
    assert wrong["bits_differ"] > max(1e-3, 20 * right["bits_differ"])
    inverted = shares(layer, ~bits_of(layer, "fp32", x, 500), x)
    assert inverted["bits_differ"] > 0.999
    assert inverted["tokens_differ"] == 1.0


def test_turns_after_the_first_other_one_do_not_count() -> None:
    exact = torch.tensor([[[True, True, False]], [[False, False, False]]])
    found = torch.tensor([[[True, False, True]], [[False, False, False]]])
    values = torch.tensor([[[3.0, 0.5, -2.0]], [[-1.0, -1.0, -1.0]]], dtype=torch.float64)
    as_path = compare_bits(found, exact, values, path=True)
    assert (as_path["bits"], as_path["bits_differ"], as_path["codes_differ"]) == (5, pytest.approx(1 / 5), 0.5)
    assert as_path["widest"] == pytest.approx(0.5 / (values.square().mean().sqrt().item()))
    assert compare_bits(found, exact, values, path=False)["bits_differ"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("config", [SMALL, TREE, replace(TREE, activation="relu")], ids=["lookup", "tree", "relu"])
def test_the_rate_alone_is_that_of_the_comparison(config: LookupConfig | TreeConfig) -> None:
    layer, x = build(config), torch.randn(4000, 24)
    for dtype in ("fp32", "int8"):
        rate = flip_rate(layer, layer.pack(dtype), x, 1000)
        assert rate == shares(layer, bits_of(layer, dtype, x, 1000), x)["bits_differ"]
    assert rate, "16-bit routing flips none of sixteen thousand decisions"


def test_a_tree_of_one_level_decides_nothing() -> None:
    layer = build(replace(TREE, depth=0))
    assert flip_rate(layer, layer.pack("bf16"), torch.randn(5, 24), 5) is None


def test_result_and_its_table() -> None:
    cases = (FlipCase(layer="a", d=24, config=SMALL), FlipCase(layer="b", d=24, config=TREE))
    result = run_flips_bench(cases, batches=(1, 64), tokens=64)
    again = run_flips_bench(cases, batches=(1, 64), tokens=64)
    assert result["rows"] == again["rows"]
    assert result["settings"]["seed"] == 0
    assert {row["dtype"] for row in result["rows"]} == {"fp32", "bf16", "int8"}
    for row in result["rows"]:
        assert row["rms_error"] < (0.9 if row["tokens_differ"] else 0.05)
        assert row["max_error"] >= row["rms_error"]
    table = flips_table(result)
    assert len(table.rows) == len(result["rows"])
    assert all(len(row) == len(table.head) for row in table.rows)
