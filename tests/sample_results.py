"""Small results of every kind that a report shows, the page that is made of them, and counts of a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nogemm.bench.profile.counts import Counts
from nogemm.bench.report.write import write_report

LINE = "Some CPU, 2 cores"
ONE = Counts(
    instructions=5000.0,
    multiply_adds=1000.0,
    accesses=400.0,
    access_bytes=12800.0,
    l1_misses=100.0,
    l2_misses=40.0,
    llc_misses=10.0,
    tlb_misses=8.0,
    page_walks=1.0,
)


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "samples": 100}


def layer_result() -> dict[str, Any]:
    rows = [
        {"contender": name, "batch": batch, "cache": "fresh", "codes": "uniform", "us_median": us * batch}
        | {"us_p10": us, "us_p90": 2 * us * batch, "ratio": us / 3.0, "verified": True, "max_error": 1e-6}
        for name, us in (("nogemm-fp32", 3.0), ("torch-fp32", 30.0))
        for batch in (1, 64)
    ]
    rows.append(
        {"contender": "other", "batch": 1, "cache": "fresh", "codes": "uniform", "missing": "pip install other"}
    )
    return {"kind": "layer", "machine_line": LINE, "settings": {"d": 384, "hidden": 1536}, "rows": rows}


def demo_result() -> dict[str, Any]:
    scores = {"mrr_at_10": figure(0.78), "agreement": figure(0.93)}
    cost = {"flops": 2.4e6, "bytes_read": 4.7e6, "parameters": 1_180_000}
    site = {"name": "encoder.layer.0", "config": {"kind": "lookup", "tables": 64}, "fitted": "random"}
    quality = [
        {"name": "teacher", "scores": {"mrr_at_10": figure(0.79)}, "flops": 2.4e6, "file_bytes": 9e7},
        {"name": "ours", "scores": scores, "flops": 3.3e5, "ours": True, "file_bytes": 2e8},
    ]
    latency = [
        {"contender": name, "batch": 32, "length": 128, "us_median": us, "us_p10": us, "us_p90": us}
        for name, us in (("nogemm-fp32", 1e5), ("torch-fp32", 4e5))
    ]
    return {
        "kind": "demo",
        "title": "a <demo>",
        "machine": {"line": LINE},
        "quality": quality,
        "recorded": [{"name": "FFNs removed", "scores": scores, "flops": 0.0}],
        "latency": latency,
        "sites": [site | {"before": cost, "after": cost}],
    }


def train_step_result() -> dict[str, Any]:
    rows = [
        {"contender": name, "tokens": 4096, "codes": "uniform", "us_median": us, "us_p10": us, "us_p90": us}
        for name, us in (("nogemm", 5e4), ("dense-fused", 3e5))
    ]
    return {"kind": "train-step", "machine_line": LINE, "settings": {"d": 768, "hidden": 3072}, "rows": rows}


def report(tmp_path: Path, *results: dict[str, Any]) -> str:
    paths = []
    for i, result in enumerate(results):
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(result))
    return write_report(paths, tmp_path / "report.html").read_text()
