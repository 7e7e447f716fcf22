"""`bench methods` end to end on a tiny shape: every registered layer, verified, with ratios to torch fp32."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

import nogemm
from nogemm.bench.contenders.layer import our_layer
from nogemm.bench.engine.check import compare, token_errors
from nogemm.bench.engine.rounding import our_bound
from nogemm.bench.methods import MethodsBenchArgs, presets, run_methods_bench
from nogemm.bench.report.tables import methods_table
from nogemm.bench.report.write import write_report
from nogemm.config import layer_kinds, parse_layer
from nogemm.errors import ConfigError
from nogemm_papers.fff_gather import BMM, GATHER, published_forms

TINY: dict[str, Any] = {
    "d": 32,
    "hidden": 64,
    "batch": (1, 16),
    "against": ("torch-int8",),
    "threads": 1,
    "rounds": 1,
    "seconds": 0.005,
    "pool_cap_bytes": 1 << 20,
}
OURS = layer_kinds()
CHUNKED = "nogemm-slide-chunk128"


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return run_methods_bench(MethodsBenchArgs(**TINY, methods=OURS), more=published_forms)


@pytest.mark.slow
def test_every_layer_is_verified_and_timed(result: dict[str, Any]) -> None:
    names = {f"nogemm-{kind}" for kind in OURS} | {CHUNKED, "torch-fp32", "torch-int8", GATHER, BMM}
    assert {row["contender"] for row in result["rows"]} == names
    assert len(result["rows"]) == 2 * len(names)
    for row in result["rows"]:
        assert row["verified"], row
        assert row["us_median"] > 0
        reference = next(r for r in result["rows"] if r["contender"] == "torch-fp32" and r["batch"] == row["batch"])
        assert row["ratio"] == pytest.approx(reference["us_median"] / row["us_median"])
    json.dumps(result, allow_nan=False)


@pytest.mark.slow
def test_the_published_ratio_is_to_the_batched_dense_form(result: dict[str, Any]) -> None:
    for batch in (1, 16):
        rows = {row["contender"]: row for row in result["rows"] if row["batch"] == batch}
        assert rows[GATHER]["published_ratio"] == pytest.approx(rows[BMM]["us_median"] / rows[GATHER]["us_median"])
        assert "published_ratio" not in rows[BMM]
        assert f"{rows[GATHER]['published_ratio']:.3g}x at {batch}" in methods_table(result).hint


@pytest.mark.slow
def test_costs_are_the_layers_own(result: dict[str, Any]) -> None:
    entry = next(e for e in result["methods"] if e["method"] == "switch")
    layer = nogemm.layer_config(entry["config"]).build(32, hidden=64)
    assert entry["flops"] == layer.cost(1).flops
    assert entry["bytes_read"] == {"1": layer.cost(1).bytes_read, "16": layer.cost(16).bytes_read}
    assert entry["parameters"] == layer.cost(1).parameters


@pytest.mark.slow
def test_computed_neurons_are_counted(result: dict[str, Any]) -> None:
    entries = {entry["contender"]: entry for entry in result["methods"]}
    with_counts = {"nogemm-slide", "nogemm-mongoose", CHUNKED}
    assert {name for name, entry in entries.items() if "active" in entry} == with_counts
    for name in with_counts:
        active = entries[name]["active"]
        layer = nogemm.layer_config(entries[name]["config"]).build(32, hidden=64)
        assert active["tokens"] == 1024
        assert 0 < active["mean"] <= active["p95"] <= 64
        assert active["expected"] == layer.expected_active(active["chunk"])
        assert active["expected_flops"] == pytest.approx(layer.cost(1024).flops / 1024)
        assert active["flops"] - active["expected_flops"] == pytest.approx(
            4 * 32 * (active["mean"] - active["expected"]), rel=1e-6
        )
    assert entries[CHUNKED]["active"]["chunk"] == 128
    table = methods_table(result)
    rows = {row[0].partition(",")[0]: row for row in table.rows}  # a short run says how many rounds it had
    mean, p95 = table.head.index("computed"), table.head.index("p95")
    shown = entries[CHUNKED]["active"]
    assert rows[CHUNKED][mean : p95 + 1] == [f"{shown['mean']:,.1f}", f"{shown['p95']:,.1f}"]
    assert rows["nogemm-tree"][mean] == rows["torch-fp32"][mean] == ""


def test_counts_by_hand() -> None:
    layer = nogemm.SlideConfig(bits=1, tables=1, chunk=2).build(2, hidden=3).eval()
    with torch.no_grad():
        layer.planes.copy_(torch.tensor([[1.0], [0.0], [0.0]]))
        layer.neurons.up.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]))
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    active = layer.counted_neurons(x)  # 1, 1, 2, 2, 3, 3 neurons
    assert (active["mean"], active["p95"]) == (2.0, 3.0)
    assert active["expected"] == 3 * 0.75
    hashing = 2 * 3
    assert active["flops"] == pytest.approx(hashing + 2.0 * (4 * 2))
    assert active["expected_flops"] == pytest.approx(hashing + 2.25 * (4 * 2))


@pytest.mark.slow
def test_results_without_counts_are_still_shown(result: dict[str, Any]) -> None:
    old = json.loads(json.dumps(result))
    for entry in old["methods"]:
        entry.pop("active", None)
    table = methods_table(old)
    assert "computed" not in table.head
    assert all(len(row) == len(table.head) for row in table.rows)


@pytest.mark.slow
def test_the_table_and_the_report_show_every_layer(result: dict[str, Any], tmp_path: Any) -> None:
    table = methods_table(result)
    assert len(table.rows) == len(OURS) + 5
    assert all(len(row) == len(table.head) for row in table.rows)
    broken = json.loads(json.dumps(result))
    broken["rows"][0] |= {"us_median": None, "ratio": None, "error": "does not match"}
    assert "does not match" in [cell for row in methods_table(broken).rows for cell in row]
    (tmp_path / "methods.json").write_text(json.dumps({"kind": "methods", **result}))
    page = write_report([tmp_path / "methods.json"], tmp_path / "page.html").read_text()
    assert "nogemm-switch" in page


def test_every_registered_layer_has_a_preset_that_builds() -> None:
    args = MethodsBenchArgs(d=48, hidden=96, methods=layer_kinds())
    names = [name for name, _, _ in presets(args)]
    assert [name for name in names if name != CHUNKED] == [f"nogemm-{kind}" for kind in layer_kinds()]
    assert names[names.index("nogemm-slide") + 1] == CHUNKED
    assert CHUNKED not in [name for name, _, _ in presets(MethodsBenchArgs(methods=("tree",)))]
    for _, kind, words in presets(args):
        assert parse_layer(kind, words).build(48, hidden=96).cost(1).parameters > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("magic",)}, "unknown layer kind 'magic'"),
        ({"dtype": "fp8"}, "--dtype must be one of"),
        ({"batch": ()}, "--batch"),
        ({"d": 0}, "d=0"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_methods_bench(MethodsBenchArgs(**{**TINY, **change}))


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("kind", OURS)
def test_every_layer_passes_its_check_in_low_precision(kind: str, dtype: str) -> None:
    """The check that comes before timing, without the timing; and it notices another token's answer."""
    args = MethodsBenchArgs(d=64, hidden=128, methods=(kind,))
    _, _, words = presets(args)[0]
    settings = {"method": kind, "set": words, "d": 64, "hidden": 128, "activation": "gelu", "seed": 0}
    layer, x = our_layer(settings), torch.randn(200, 64)
    exact = copy.deepcopy(layer).double()(x.double())
    errors = token_errors(layer.rounded(dtype)(x), exact)
    bound = our_bound(dtype, errors, layer.dynamic_int8)
    y = layer.pack(dtype)(x)
    assert compare(y, exact, bound)["verified"]
    if kind != "no":
        assert not compare(y.roll(1, 0), exact, bound)["verified"]
