"""The report's section of a profile: the roofline has its roofs and its points, the tables their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nogemm.bench.profile.counts import Counts, rates
from nogemm.bench.report.profile import roofline
from nogemm.bench.report.write import write_report
from nogemm.errors import ConfigError
from nogemm_papers.energy import constants, energy_rows

COUNTS = Counts(
    instructions=9e3, multiply_adds=1e3, accesses=2e3, access_bytes=4e4, l1_misses=100.0, l2_misses=10.0, llc_misses=1.0
)


def result() -> dict[str, Any]:
    machine = {"threads": 1, "gflops": {"fp32": 100.0}, "gb_per_s": {"L1": 400.0, "L2": 100.0, "memory": 10.0}}
    slow = machine | {"gflops": {"fp32": 12.0}}
    row = {"contender": "nogemm-fp32", "phase": "gather", "batch": 64, "us_median": 2.0, **rates(COUNTS, 2.0, 100.0)}
    point = {"contender": "nogemm-fp32", "phase": "gather", "batch": 64, "gflops": 1.0, "bound": "L2"}
    return {
        "kind": "profile",
        "machine_line": "a machine",
        "isa": "avx512_bf16",
        "settings": {"method": "lookup", "d": 64, "set": [], "dtype": "fp32", "threads": 1, "ours": "nogemm-fp32"},
        "rooflines": {"scalar": slow, "avx512": machine, "avx512_bf16": machine},
        "counting": {"source": "perf"},
        "rows": [row],
        "points": [point | {"roofline_fraction": 0.5, "intensity": {"L1": 0.05, "L2": 0.3}}],
        "energy": {"constants": constants(), "rows": energy_rows({("nogemm-fp32", "gather", 64): COUNTS})},
    }


def test_roofs_and_points_are_drawn() -> None:
    chart = roofline(result())
    for text in ("L1 400 GB/s", "L2 100 GB/s", "memory 10", "scalar 12", "avx512 100", "gather 64 (L2)"):
        assert text in chart
    assert "avx512_bf16 100" not in chart  # the same peak as avx512's
    assert "gather 64 (L2): 1.00 at 0.300" in chart  # placed at its intensity for the level that bounds it


def test_a_page_holds_the_profile(tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(json.dumps(result()))
    page = write_report([tmp_path / "profile.json"], tmp_path / "page.html").read_text()
    for text in (
        "lookup d=64 fp32, 1 threads",
        "Roofline",
        "LLC miss",
        "Energy of accesses",
        "Events: hardware counters",
    ):
        assert text in page


def test_a_profile_without_events_has_times_alone(tmp_path: Path) -> None:
    data = result()
    data |= {"points": [], "counting": {"source": None, "why_not": "not asked for"}}
    data["energy"]["rows"] = []
    (tmp_path / "profile.json").write_text(json.dumps(data))
    page = write_report([tmp_path / "profile.json"], tmp_path / "page.html").read_text()
    assert "Roofline" not in page
    assert "Times alone, no events: not asked for." in page
    (tmp_path / "broken.json").write_text(json.dumps({"kind": "profile"}))
    with pytest.raises(ConfigError, match="not a complete profile result"):
        write_report([tmp_path / "broken.json"], tmp_path / "page.html")
