"""`bench layer` end to end on a tiny shape: the file's form, the arithmetic of its rates, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fake_contenders
from nogemm.bench import layer as bench
from nogemm.bench.contenders.layer import COPIES, DenseContender, dense_work, our_layer
from nogemm.bench.engine.check import token_errors
from nogemm.bench.engine.pool import write_pool
from nogemm.bench.engine.rounding import our_bound
from nogemm.bench.layer import LayerBenchArgs, run_layer_bench, weight_level
from nogemm.bench.report.data import Results, _layer_row
from nogemm.bench.report.svg import number
from nogemm.bench.report.write import render
from nogemm.cli import bench as bench_cli
from nogemm.errors import ConfigError
from nogemm.layers import LookupFFN

HERE = Path(fake_contenders.__file__).parent
KEYS = {
    "contender",
    "batch",
    "cache",
    "codes",
    "us_median",
    "us_p10",
    "us_p90",
    "us_per_token",
    "ratio",
    "verified",
    "max_error",
    "gflops",
    "gb_per_s",
    "roofline_fraction",
    "bound",
}
TINY: dict[str, Any] = {
    "d": 32,
    "set": ("tables=16", "bits=3", "projection.block=8"),
    "batch": (1, 16),
    "threads": 1,
    "rounds": 2,
    "seconds": 0.01,
    "pool_cap_bytes": 1 << 20,
}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    args = LayerBenchArgs(**TINY, against=("torch-fp32", "torch-int8"), cache=("fresh", "warm"))
    return run_layer_bench(args)


@pytest.mark.parametrize("engine", ["torch-fp32", "onnxruntime-fp32", "openvino-f32"])
def test_a_repeated_token_after_fresh_ones(engine: str, tmp_path: Path) -> None:
    """One token goes through twelve copies when it is fresh, through one layer when it is repeated."""
    write_pool(tmp_path / "pool", 400, 8, seed=1)
    settings = {"engine": engine, "d": 8, "hidden": 16, "activation": "gelu", "seed": 0, "pool": str(tmp_path / "pool")}
    contender = DenseContender(settings)
    case = {"batch": 1, "codes": "uniform"}
    facts = contender.prepare(case | {"cache": "fresh"})
    assert (facts["layers"], facts["verified"]) == (COPIES, True)
    assert contender.draw() is not contender.draw()
    facts = contender.prepare(case | {"cache": "warm"})
    assert (facts["layers"], facts["verified"]) == (1, True)
    assert contender.draw() is contender.draw()
    assert contender.runner is not None
    assert len(contender.runner.result(contender.run(contender.draw()))) == 1


def test_every_contender_has_every_case_and_key(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert json.loads(json.dumps(result))["rows"] == rows
    assert {row["contender"] for row in rows} == {"nogemm-fp32", "torch-fp32", "torch-int8"}
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        assert row.keys() >= KEYS
        assert row["verified"] is True
        assert row["codes"] == "uniform"
        assert 0 < row["us_p10"] <= row["us_median"] <= row["us_p90"]


def test_rates_follow_from_time_and_work(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert row["us_per_token"] == row["us_median"] / row["batch"]
        assert row["gflops"] == pytest.approx(row["flops"] / row["us_median"] / 1000)
        if row["contender"] == "torch-fp32":
            assert row["flops"] == 4 * 32 * 128 * row["batch"]
            ours = [
                other["us_median"]
                for other in result["rows"]
                if other["contender"] == "nogemm-fp32"
                and (other["batch"], other["cache"]) == (row["batch"], row["cache"])
            ]
            assert row["ratio"] == row["us_median"] / ours[0]


def test_batch_one_goes_through_twelve_copies_when_fresh(result: dict[str, Any]) -> None:
    layers = {(row["batch"], row["cache"]): row["layers"] for row in result["rows"]}
    assert layers == {(1, "fresh"): 12, (16, "fresh"): 1, (1, "warm"): 1, (16, "warm"): 1}


@pytest.mark.slow
def test_rows_with_discrete_choices_say_how_many_rounding_turns_over(capsys: pytest.CaptureFixture[str]) -> None:
    fields = ("tables=128", "bits=6", "projection.block=8")
    tiny: dict[str, Any] = TINY | {"batch": (300,), "dtype": "fp32,int8", "set": fields}
    lookup = run_layer_bench(LayerBenchArgs(**tiny, against=("torch-fp32",)))
    found = {row["contender"]: row.get("flip_rate", "none") for row in lookup["rows"]}
    assert found["torch-fp32"] == "none"
    assert 0 <= found["nogemm-fp32"] < found["nogemm-int8"] < 0.01
    bench_cli.print_rows(lookup, ("batch",), "us", 1.0)
    assert f"{found['nogemm-int8']:.1e}" in capsys.readouterr().out
    page = render(Results(layers=[_layer_row(row, lookup) for row in lookup["rows"]]))
    assert "<th>flip rate</th>" in page
    assert number(found["nogemm-int8"], 2) in page

    tiny |= {"method": "tree", "set": ("depth=6", "trees=8"), "activation": "relu", "dtype": "int8", "against": ()}
    (row,) = run_layer_bench(LayerBenchArgs(**tiny))["rows"]
    assert row["verified"] is True
    assert 0 < row["flip_rate"] < 0.01
    tiny |= {"method": "dense", "set": ()}
    (row,) = run_layer_bench(LayerBenchArgs(**tiny))["rows"]
    assert "flip_rate" not in row
    bench_cli.print_rows({"machine_line": "", "rows": [row]}, ("batch",), "us", 1.0)
    assert "flip rate" not in capsys.readouterr().out


def test_the_file_says_where_it_comes_from(result: dict[str, Any]) -> None:
    assert result["settings"]["seed"] == 0
    assert result["settings"]["hidden"] == 128
    assert result["machine"]["versions"]["torch"]
    assert result["pool"]["note"].startswith("capped")


def test_a_layer_without_its_kernel_says_so(
    result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {row["native"] for row in result["rows"] if row["contender"] == "nogemm-fp32"} == {True}
    assert all("native" not in row for row in result["rows"] if row["contender"] != "nogemm-fp32")
    bench_cli.print_rows(result, ("batch",), "us", 1.0)
    assert "not native" not in capsys.readouterr().out

    monkeypatch.setenv("NOGEMM_DISABLE_NATIVE", "1")  # for the worker; this process has loaded the kernels
    tiny: dict[str, Any] = TINY | {"batch": (16,), "against": ()}
    without = run_layer_bench(LayerBenchArgs(**tiny))
    (row,) = without["rows"]
    assert row["native"] is False
    assert row["verified"] is True
    bench_cli.print_rows(without, ("batch",), "us", 1.0)
    out = capsys.readouterr().out
    assert "nogemm-fp32, not native" in out
    assert "not the kernel's times" in out


@pytest.mark.parametrize(
    ("method", "choices", "native"),
    [
        ("lookup", ("neighbours=3",), False),
        ("lookup", ("neighbours=1",), True),
        ("switch", ("experts=2", "hidden=8"), True),
        ("leaf_tree", ("depth=2", "leaf_width=4"), True),
        ("dense", (), None),
        ("no", (), None),
    ],
)
def test_which_packed_layers_run_their_kernel(method: str, choices: tuple[str, ...], native: bool | None) -> None:
    fields = (*TINY["set"], *choices) if method == "lookup" else choices
    layer = our_layer({"method": method, "set": fields, "d": 32, "hidden": 64, "activation": "gelu", "seed": 0})
    assert layer.pack("fp32").native is native


@pytest.mark.parametrize("fake", ["OneWrongRow", "SwappedTables"])
def test_a_contender_with_wrong_output_has_no_time(monkeypatch: pytest.MonkeyPatch, fake: str) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    make = bench._specs
    target = "torch-fp32" if fake == "OneWrongRow" else "nogemm-fp32"

    def specs(args: LayerBenchArgs, pool: Path) -> list[Any]:
        made = make(args, pool)
        for spec in made:
            if spec.name == target:
                object.__setattr__(spec, "factory", f"fake_contenders:{fake}")
        return made

    monkeypatch.setattr(bench, "_specs", specs)
    tiny: dict[str, Any] = TINY | {"batch": (16,), "against": ("torch-fp32",)}
    args = LayerBenchArgs(**tiny)
    rows = {row["contender"]: row for row in run_layer_bench(args)["rows"]}
    assert rows[target]["verified"] is False
    assert "does not match the reference" in rows[target]["error"]
    assert all(row["ratio"] is None for row in rows.values() if row is rows[target] or fake == "SwappedTables")
    other = rows["nogemm-fp32" if fake == "OneWrongRow" else "torch-fp32"]
    assert other["verified"] is True
    assert other["us_median"] > 0


def test_absent_engines_stay_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.peers, "missing", lambda name: "openvino not installed: pip install 'nogemm[peers]'")
    args = bench.checked(LayerBenchArgs(**TINY, against=("openvino-int8",)))
    assert [spec.missing for spec in bench._specs(args, Path("pool"))] == [
        None,
        "openvino not installed: pip install 'nogemm[peers]'",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "--dtype must be one of fp32, bf16, int8"),
        ({"cache": ("hot",)}, "--cache must be fresh, warm or both, got hot"),
        ({"batch": (0,)}, "at least one token"),
        ({"against": ("torch-int4",)}, "unknown contender 'torch-int4'"),
        ({"method": "magic"}, "unknown layer kind 'magic'"),
        ({"set": ("table=3",)}, "no field 'table'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    everything: dict[str, Any] = TINY | {"against": ()} | change
    with pytest.raises(ValueError, match=message):
        run_layer_bench(LayerBenchArgs(**everything))


def test_unknown_method_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        bench.checked(LayerBenchArgs(method="magic"))


def test_dense_work_by_hand() -> None:
    # 3 -> 5 -> 3: 30 weights, 60 FLOP a token, 8 biases of 4 bytes.
    assert dense_work(3, 5, 2, "fp32") == (120.0, 30 * 4 + 32)
    assert dense_work(3, 5, 2, "int8") == (120.0, 30 + 32)


def test_row_bytes_count_every_read() -> None:
    layer = our_layer({"method": "lookup", "set": TINY["set"], "d": 32, "hidden": 128, "activation": "gelu", "seed": 0})
    assert isinstance(layer, LookupFFN)
    assert layer.row_bytes(10) == 10 * 16 * 32 * 4
    assert layer.rounded("int8").row_bytes(10) == 10 * 16 * 32


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_rounded_bound_refuses_zeros(dtype: str) -> None:
    layer = our_layer({"method": "lookup", "set": TINY["set"], "d": 32, "hidden": 128, "activation": "gelu", "seed": 0})
    x = torch.randn(200, 32)
    with torch.no_grad():
        reference = layer(x)
        bound = our_bound(dtype, token_errors(layer.rounded(dtype)(x), reference))
    assert token_errors(torch.zeros_like(reference), reference).square().mean().sqrt() > bound.rms


def test_weight_level_is_the_nearest_cache_that_holds_them() -> None:
    found = [
        {"level": "L1d", "bytes": 100, "shared_by": 1},
        {"level": "L1i", "bytes": 900, "shared_by": 1},
        {"level": "L2", "bytes": 1000, "shared_by": 1},
    ]
    assert [weight_level(size, found) for size in (100, 101, 1001)] == ["L1", "L2", "memory"]
