"""The measurement of our operator inside OpenVINO runs, checks the operator first, and adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_scripts import load

from nogemm.bench.report_data import read_results

operator_host = load("operator_host")


def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "operator.json"
    monkeypatch.setattr(operator_host, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["operator_host.py", "--json", str(target), "--seconds", "0.001", "--batch", "33"])
    operator_host.main()
    result = json.loads(target.read_text())
    assert {(row["graph"], row["rest"]) for row in result["rows"]} == {
        ("operator", "f32"),
        *((what, rest) for what in ("between", "matrices") for rest in ("f32", "bf16", "int8")),
    }
    assert all(row["us_median"] > 0 for row in result["rows"])
    assert result["found"][0] in capsys.readouterr().out
    assert read_results([target]).tables[0].title == "The operator inside OpenVINO"


def test_what_follows_from_the_times() -> None:
    def row(graph: str, rest: str, threads: int, us: float) -> dict[str, Any]:
        return {"graph": graph, "rest": rest, "threads": threads, "batch": 64, "us_median": us}

    rows = [row("operator", "f32", 1, 180.0), row("operator", "f32", 2, 100.0)]
    for rest, us in (("f32", 150.0), ("bf16", 170.0), ("int8", 160.0)):
        rows += [row("between", rest, 2, us), row("matrices", rest, 2, 40.0)]
    assert operator_host.found(rows, 2) == [
        "64 tokens: 100 us alone, 1.80 times one thread's speed; 110 between f32, 130 between bf16, 120 between int8"
    ]


def test_another_layer_is_noticed() -> None:
    packed = operator_host.packed_layer()
    model = operator_host.compiled(operator_host.graph(packed, "operator"), "f32", 1)
    operator_host.check(model, packed, "operator", "f32", 3)
    middle = packed.get_buffer("packed").numel() // 2
    packed.get_buffer("packed")[middle : middle + 65_536] ^= 1
    with pytest.raises(AssertionError, match="differs from torch at 3 tokens"):
        operator_host.check(model, packed, "operator", "f32", 3)
    wrong = operator_host.compiled(operator_host.graph(packed, "matrices"), "f32", 1)
    with pytest.raises(AssertionError, match="between, f32: differs from torch at 3 tokens"):
        operator_host.check(wrong, packed, "between", "f32", 3)
