"""The command of the full table: its parts, what it leaves out and why, one small part for real, the summary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmark_scripts import load
from nogemm.bench.contenders.gather import EMBEDDING_BAG

table5 = load("table5")


def test_parts_cover_the_paper_and_have_names_of_their_own() -> None:
    parts = table5.all_parts(Path("somewhere"))
    names = [part.name for part in parts]
    assert len(set(names)) == len(names)
    full = {part.name: part for part in parts if {1, 8, 64, 512, 4096, 32768} <= set(part.batches)}
    assert set(full) == {"d512", "d512-methods", "d768", "d768-methods"}
    for d in (512, 768):
        engines, others = full[f"d{d}"], full[f"d{d}-methods"]
        assert {layer.dtype for layer in engines.ours} == {"int8", "bf16", "fp32"}
        assert set(engines.dense) >= {"torch-fp32", "inductor-bf16", "onnxruntime-int8", "openvino-int8", "jax-fp32"}
        assert {layer.method for layer in others.ours} == {"lookup", "tree", "hire", "slide", "mongoose", "yoso"}
        assert 16384 in engines.batches
        assert others.gather
        assert others.equal_active == ("torch-fp32", "openvino-int8")
        assert not engines.equal_active
        assert table5.OURS in {layer.name for layer in others.ours}, "no common yardstick"
    assert any(part.threads == 1 for part in parts)
    assert any(part.cache == "warm" for part in parts)
    assert [part.name for part in parts if part.checkpoint] == ["d384-trained"]
    assert not any(part.checkpoint for part in table5.all_parts(None))


def test_what_does_not_fit_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table5, "machine", lambda: {"memory_bytes": 8 << 30})
    part = table5.Part(name="wide", d=8192, hidden=32768, ours=(), dense=("torch-fp32",))
    (spec,) = table5.specs(part, tmp_path)
    assert spec.missing == "12 copies would take 48 GiB to prepare"
    small = table5.Part(name="narrow", d=64, hidden=256, ours=(), dense=("torch-fp32",))
    assert table5.specs(small, tmp_path)[0].missing is None


def test_the_dense_layer_of_equal_flop() -> None:
    part = table5.Part(name="p", d=512, hidden=2048, ours=table5.lookups(table5.LOOKUPS[512]))
    # BH4 of blocks of 64 over 512, twice, its Hadamard transforms, and 128 rows of 512: 0.70 MFLOP.
    assert 300 < table5.equal_width(part) < 400


def test_dense_layers_of_as_many_neurons_as_answer(tmp_path: Path) -> None:
    (part,) = (part for part in table5.all_parts(None) if part.name == "d768-methods")
    active = {layer.method: table5.build(part, layer).active_neurons() for layer in part.ours}
    assert active == {"lookup": None, "tree": 12, "hire": 154, "slide": None, "mongoose": None, "yoso": None}
    specs = {spec.name: spec.settings.get("hidden") for spec in table5.specs(part, tmp_path)}
    narrow = {name: hidden for name, hidden in specs.items() if " neurons as " in name}
    assert narrow == {
        "torch-fp32, 12 neurons as tree": 12,
        "openvino-int8, 12 neurons as tree": 12,
        "torch-fp32, 154 neurons as hire": 154,
        "openvino-int8, 154 neurons as hire": 154,
    }


@pytest.mark.slow
def test_a_small_part_is_timed_verified_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = table5.Layer(name="nogemm-tree-int8", method="tree", set=("depth=2",), dtype="int8")
    ours = (*table5.lookups(("tables=4", "bits=3", "projection.block=8"), "int8"), tree)
    part = table5.Part(
        name="small",
        d=32,
        hidden=64,
        ours=ours,
        dense=("torch-fp32", "jax-fp32"),
        equal_flop=("torch-fp32",),
        equal_active=("torch-fp32", "openvino-int8"),
        gather=True,
        batches=(3,),
        threads=1,
    )
    target = tmp_path / "table5" / "small.json"
    table5.record(part, target, 0.001)
    found = json.loads(target.read_text())
    assert found["settings"]["threads"] == 1
    rows = {row["contender"]: row for row in found["rows"]}
    width = table5.equal_width(part)
    names = {"nogemm-lookup-int8", "nogemm-tree-int8", EMBEDDING_BAG, "torch-fp32", "jax-fp32"}
    names |= {f"torch-fp32, {width} wide", "torch-fp32, 3 neurons as tree", "openvino-int8, 3 neurons as tree"}
    assert set(rows) == names
    assert all(row["verified"] and row["us_median"] > 0 for row in rows.values()), rows
    assert rows["nogemm-lookup-int8"]["ratio"] == 1.0
    before = target.read_bytes()
    table5.record(part, target, 0.001)
    assert "recorded already" in capsys.readouterr().out
    assert target.read_bytes() == before
    table5.summarise(["small", "not there"], tmp_path)
    (case,) = json.loads((tmp_path / "table5.json").read_text())["cases"]
    assert case["fastest_dense"] in ("torch-fp32", "jax-fp32")
    assert case["fastest_equal_flop"] == f"torch-fp32, {width} wide"
    assert case["ratio"] == pytest.approx(case["fastest_dense_us"] / case["ours"]["nogemm-lookup-int8"])
    assert "ours int8" in capsys.readouterr().out
