"""The measurement of our operator inside OpenVINO runs, checks the operator first, and adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark_scripts import load
from nogemm.bench.report.data import read_results

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


def test_a_bit_that_rounding_flips_is_accepted_and_a_far_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake host: torch's own products, one token moved across the border of one of its bits."""
    packed, layer = operator_host.packed_layer(), operator_host.layer()
    before_DD, after_DD = torch.from_numpy(operator_host.matrices())
    rows_MD = layer.projection.dense_matrix()
    rows_MD = rows_MD - rows_MD.mean(1, keepdim=True)

    def bits(seen_D: torch.Tensor) -> torch.Tensor:
        return layer.projection(layer.norm(seen_D.unsqueeze(0)))[0]

    def moved(seen_D: torch.Tensor, j: int, to: float) -> torch.Tensor:
        """Give bit j the value `to`: exactly, but for the few sums on the way."""
        for _ in range(3):
            step = (to - bits(seen_D)[j]) * seen_D.std(correction=0) / rows_MD[j].square().sum()
            seen_D = seen_D + step * rows_MD[j]
        return seen_D

    def host(flip: int, value: float) -> Any:
        """Answer as if `flip` had turned: the tokens are drawn so that it is about `value`."""

        def run(inputs: list[Any]) -> list[Any]:
            seen_ND = torch.from_numpy(inputs[0]) @ before_DD.T
            seen_ND[0] = moved(seen_ND[0], flip, -value)
            return [(packed(seen_ND) @ after_DD.T).numpy()]

        return run

    for value, accepted in ((1e-5, True), (0.2, False)):
        seen_D = moved(torch.randn(D := operator_host.D), 5, value)
        x_D = torch.linalg.solve(before_DD.double(), seen_D.double()).float()
        tokens = torch.cat((x_D.unsqueeze(0), torch.randn(32, D)))
        monkeypatch.setattr(torch, "randn", lambda *shape, tokens=tokens: tokens)
        if accepted:
            operator_host.check(host(5, value), packed, "between", "f32", 33)
        else:
            with pytest.raises(AssertionError, match="between, f32: differs from torch at 33 tokens"):
                operator_host.check(host(5, value), packed, "between", "f32", 33)
        monkeypatch.undo()


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
