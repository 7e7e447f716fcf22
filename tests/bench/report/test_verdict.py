"""Where dense is faster is said from the rows that were timed, and from nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import nogemm
from nogemm.bench.layer import LayerBenchArgs
from nogemm.bench.report.verdict import BATCHES, compare_sites, dense_faster, verdict
from nogemm.convert.report import ConversionReport, SiteReport
from nogemm.cost import Cost
from nogemm.shape import FFNShape


def row(contender: str, batch: int, ratio: float | None) -> dict[str, Any]:
    return {"contender": contender, "batch": batch, "cache": "fresh", "ratio": ratio}


ROWS = [
    row("nogemm-int8", 1, 1.0),
    row("nogemm-fp32", 1, 0.5),
    row("torch-int8", 1, 7.0),
    row("torch-int8", 64, 0.8),
    row("openvino-int8", 64, 0.5),
    row("openvino-int8", 4096, None),
]


def test_only_timed_dense_contenders_count() -> None:
    found = dense_faster(ROWS)
    assert [(entry["contender"], entry["batch"]) for entry in found] == [("torch-int8", 64), ("openvino-int8", 64)]
    assert [entry["speedup"] for entry in found] == pytest.approx([1.25, 2.0])
    assert verdict(ROWS) == "dense was faster at 64 tokens: torch-int8 1.2x, openvino-int8 2x"
    assert verdict(ROWS[:3]) == "no dense contender was faster at 1 tokens"


def report_of(*shapes: tuple[int, int, int, str]) -> ConversionReport:
    cost = Cost(1.0, 1.0, 1)
    sites = [
        SiteReport(
            f"layer.{i}",
            nogemm.NoConfig(),
            FFNShape(d_in=d, d_out=d_out, hidden=hidden, activation=activation, gated=False),
            cost,
            cost,
            "random",
        )
        for i, (d, d_out, hidden, activation) in enumerate(shapes)
    ]
    return ConversionReport(tuple(sites))


def test_a_run_without_a_ratio_has_no_verdict() -> None:
    assert "no dense contender" not in verdict([{"contender": "nogemm-int8", "batch": 1, "skipped": "not reached"}])


def test_every_kind_of_site_is_timed_once() -> None:
    seen: list[LayerBenchArgs] = []

    def run(args: LayerBenchArgs) -> dict[str, Any]:
        seen.append(args)
        return {"rows": ROWS}

    report = report_of((64, 64, 256, "gelu"), (64, 64, 256, "gelu"), (64, 64, 128, "odd"), (64, 32, 128, "gelu"))
    kinds = compare_sites(report, "lookup", ["tables=8"], "int8", run=run)
    assert [kind["sites"] for kind in kinds] == [2, 1, 1]
    assert [(args.d, args.hidden, args.activation) for args in seen] == [(64, 256, "gelu"), (64, 128, "gelu")]
    assert all(args.method == "lookup" and args.set == ("tables=8",) and args.batch == BATCHES for args in seen)
    assert kinds[0]["verdict"] == verdict(ROWS)
    assert kinds[2]["rows"] == []
    assert "not timed" in kinds[2]["verdict"]


def test_a_conversion_says_what_it_replaced(tiny: nn.Module) -> None:
    report = nogemm.convert(tiny, nogemm.NoConfig())
    replaced = report.sites[0].replaced
    assert (replaced.d_in, replaced.hidden, replaced.gated) == (32, 48, False)
    replaced = report.to_dict()["sites"][0]["replaced"]
    assert replaced["hidden"] == 48
    assert replaced["d_model"] == replaced["d_in"] == report.sites[0].replaced.d_in


@pytest.fixture
def tiny() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    return BertModel(config).eval()
