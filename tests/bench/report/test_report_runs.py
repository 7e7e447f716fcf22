"""Tables and charts of a study: Student's intervals, pairing by seed, the front."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from nogemm.bench.quality.seeds import front, paired_difference, seed_mean
from nogemm.bench.report.runs import read_runs, runs_charts, runs_table
from nogemm.bench.report.write import write_report


def test_the_interval_is_students() -> None:
    values = [1.0, 1.3, 0.8, 1.1]
    found = seed_mean(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=1.05, scale=stats.sem(values))
    assert (found["value"], found["low"], found["high"]) == pytest.approx((1.05, low, high))
    # A normal interval of so few would be a third too narrow.
    assert found["high"] - found["low"] > 1.5 * 2 * 1.96 * stats.sem(values)
    assert seed_mean([2.0]) == {"value": 2.0, "low": None, "high": None, "samples": 1}
    with pytest.raises(ValueError, match="finite"):
        seed_mean([1.0, math.nan])
    with pytest.raises(ValueError, match="finite"):
        seed_mean([])


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = {0: 1.1, 1: 5.1, 2: 9.1, 7: 100.0}, {0: 1.0, 1: 5.0, 2: 9.0}
    found = paired_difference(ours, theirs)
    assert found is not None
    assert found["value"] == pytest.approx(0.1)
    assert found["high"] - found["low"] < 1e-6
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_the_front_is_what_nothing_beats() -> None:
    points = [(4.0, 1.0), (2.0, 2.0), (3.0, 3.0), (1.0, 5.0), (1.0, 4.0), (5.0, 1.0)]
    assert front(points, lower=True) == [4, 1, 0]
    assert front([(1.0, 1.0), (2.0, 3.0), (3.0, 2.0)], lower=False) == [0, 1]
    assert front([], lower=True) == []


def study(folder: Path) -> Path:
    """Write the results of a made-up study: two good rows of two seeds, and a row of which one seed failed."""
    metric = {"name": "validation_loss", "label": "validation loss", "lower": True}
    rows = [
        {"name": name, "title": f"the {name}", "layer": None, "seeds": [0, 1]} for name in ("dense", "lookup", "tree")
    ]
    head = {"kind": "study-runs", "study": "s", "title": "Made up", "of": "train", "metric": metric}
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(head | {"baseline": "dense", "rows": rows}))
    for name, flops, value in (("dense", 4e6, 2.0), ("lookup", 1e6, 2.1), ("tree", 2e6, 2.5)):
        (folder / name).mkdir()
        for seed in (0, 1):
            failed = name == "tree" and seed == 1
            figures: dict[str, Any] = {"validation_loss": value + seed, "ffn_flops": flops, "parameters": 1e6}
            figures |= {"tokens": 1e6, "tokens_per_second": 1e3, "ffn_parameters": 5e5}
            figures["history"] = [{"tokens": t, "validation_loss": value + seed + 1e5 / t} for t in (1e5, 1e6)]
            run = {"seed": seed, "status": "failed" if failed else "done", "error": "out of memory" if failed else None}
            run |= {"value": None if failed else value + seed, "figures": None if failed else figures, "lr": 1e-3}
            run |= {"at_edge": name == "tree", "machine": {"line": "Some CPU"}}
            (folder / name / f"seed-{seed}.json").write_text(json.dumps(run))
    return folder


def test_a_study_is_laid_out(tmp_path: Path) -> None:
    found = read_runs(study(tmp_path / "s"))
    dense, lookup, tree = found["rows"]
    assert [row["front"] for row in found["rows"]] == [True, True, False]
    assert lookup["difference"]["value"] == pytest.approx(0.1)
    assert tree["errors"] == [{"seed": 1, "error": "out of memory"}]
    assert tree["mean"] == {"value": 2.5, "low": None, "high": None, "samples": 1}
    assert dense["history"][-1]["tokens"] == 1e6
    table = runs_table(found)
    assert [row[0] for row in table.rows] == ["the dense *", "the lookup *", "the tree"]
    assert table.rows[2][1] == "1, 1 failed"
    assert table.rows[1][3].startswith("+0.1000 (")
    assert table.rows[1][5] == "4.00"
    assert all(len(row) == len(table.head) for row in table.rows)
    captions = [caption for caption, _ in runs_charts(found)]
    assert captions == ["validation loss against FLOP", "validation loss against tokens"]


def test_the_page_holds_bars_and_the_front(tmp_path: Path) -> None:
    page = write_report([study(tmp_path / "s")], tmp_path / "page.html").read_text()
    assert "Made up" in page
    assert "the tree, seed 1: out of memory" in page
    assert "Some CPU" in page
    scatter = page[page.index("against FLOP") : page.index("against tokens")]
    assert scatter.count('stroke-dasharray="7 4"') == 1  # the front
    assert scatter.count('<line class="k') == 2  # intervals of the rows with two seeds
    lines = page[page.index("against tokens") :]
    assert lines.count('<line class="k') >= 4
