"""The model of a LookupFFN's time: its terms by hand, factors that it must find again, scenarios that must help."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nogemm.bench.engine.measure import Plan, Spec
from nogemm.bench.layer import LayerBenchArgs
from nogemm.cost import distinct_rows
from nogemm.errors import ConfigError
from nogemm.hardware.roofline import Roofline
from nogemm_papers import projected
from nogemm_papers.forecast import FEATURES, LookupShape, Machine, features, fit, fit_model, left_out
from nogemm_papers.projected import check_projectable, run_scenarios, shape_of, variants

MACHINE = Machine(threads=2, peak_gflops=200.0, l2=200.0, l3=50.0, memory=20.0, l2_bytes=2.0e6, l3_bytes=64.0e6)
SHAPE = LookupShape(
    d=768, d_out=768, tables=170, bits=9, block=64, rounds=4, neighbours=1, dtype="fp32", batch=4096, copies=1
)


def test_terms_by_hand() -> None:
    arithmetic, weights, call = features("hash", SHAPE, MACHINE)
    # 1530 columns of width 1024: two repeats; the first round skips the padding from 768 on.
    slots = 4096 * (2 * 64 * (768 + 3 * 1024) + 2 * 4 * 1024 * 4 + 7 * 170 * 9)
    assert arithmetic == pytest.approx(2 * slots / 200 * 1e-3)
    assert weights == pytest.approx(2 * 4 * 1024 * 64 * 4 * 86 / (50 if 2 * 4 * 1024 * 64 * 4 > 2e6 else 200) * 1e-3)
    assert call == 1.0
    near, far, _ = features("gather", SHAPE, MACHINE)
    assert near == pytest.approx(4096 * 170 * 768 * 4 / 200 * 1e-3)
    moved = 170 * distinct_rows(4096, 512) * 768 * 4
    held = 170 * 512 * 768 * 4
    assert far == pytest.approx(moved * (64e6 / held / 50 + (1 - 64e6 / held) / 20) * 1e-3)


def test_another_padding_has_narrower_rounds() -> None:
    narrow = replace(SHAPE, pad="hadamard")
    slots = 4096 * (2 * 64 * 4 * 768 + 2 * 4 * 64 * 68 + 7 * 170 * 9)
    assert features("hash", narrow, MACHINE)[0] == pytest.approx(2 * slots / 200 * 1e-3)


def test_one_token_runs_on_one_thread_and_many_do_not() -> None:
    one = features("gather", replace(SHAPE, batch=1, copies=12), MACHINE)
    alone = features("gather", replace(SHAPE, batch=1, copies=12), replace(MACHINE, threads=1))
    assert one[0] == 2 * alone[0]
    assert features("gather", SHAPE, MACHINE)[0] == features("gather", SHAPE, replace(MACHINE, threads=1))[0]


def points() -> list[tuple[str, LookupShape, float]]:
    factors = {"hash": (1.3, 0.8, 2.0), "gather": (1.1, 1.6, 0.5)}
    found = []
    for tables, dtype, block in ((170, "fp32", 64), (85, "fp32", 16), (170, "bf16", 64), (40, "int8", 32)):
        for batch in (1, 64, 4096):
            s = replace(SHAPE, tables=tables, dtype=dtype, block=block, batch=batch, copies=12 if batch == 1 else 1)
            found += [(phase, s, float(np.dot(features(phase, s, MACHINE), factors[phase]))) for phase in FEATURES]
    return found


def test_known_factors_are_found_again() -> None:
    model = fit_model(points(), MACHINE)
    assert model.factors["gather"] == pytest.approx([1.1, 1.6, 0.5], rel=1e-3)
    for phase, errors in model.errors().items():
        assert errors["worst"] < 0.02, phase
        assert errors["points"] == 12


def test_a_shape_that_behaves_otherwise_shows_in_the_error_of_left_out_points() -> None:
    wrong = [(phase, s, us * (3 if s.tables == 40 else 1)) for phase, s, us in points()]
    errors = fit_model(wrong, MACHINE).errors()
    assert errors["gather"]["worst"] > 0.5


def test_factors_are_never_negative_and_one_group_cannot_be_left_out() -> None:
    terms = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    assert fit(terms, np.array([3.0, 2.0, 1.0])).min() >= 0
    assert fit(terms, np.array([2.0, 4.0, 6.0])) == pytest.approx([2.0, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match="one group"):
        left_out(terms, np.ones(3), ["a", "a", "a"])
    with pytest.raises(ValueError, match="no measured gather"):
        fit_model([point for point in points() if point[0] == "hash"], MACHINE)


def test_scenarios_start_from_the_measured_time_and_help() -> None:
    measured = points()
    model, known = fit_model(measured, MACHINE), {(phase, s): us for phase, s, us in measured}
    timed = [
        {"contender": "nogemm-fp32", "phase": "rest", "batch": 4096, "us_median": 100.0},
        {"contender": "torch-fp32", "phase": "whole", "batch": 4096, "us_median": 90000.0},
    ]
    rows = {row["scenario"]: row for row in run_scenarios(model, known, SHAPE, MACHINE, timed)}
    now = rows["now"]
    assert now["hash_us"] == known["hash", SHAPE]
    assert now["us"] == pytest.approx(now["hash_us"] + now["gather_us"] + 100.0)
    assert now["us"] == now["measured_us"]
    assert now["speed_up"] == pytest.approx(90000.0 / now["us"])
    assert all(row["us"] < now["us"] for name, row in rows.items() if name != "now")
    assert rows["all of these"]["us"] == min(row["us"] for row in rows.values())
    assert rows["BH blocks of 16"]["gather_us"] == now["gather_us"]
    half = rows["bf16 rows and projection"]
    assert half["measured_us"] == pytest.approx(half["us"], rel=0.02)
    assert rows["twice the cache bandwidth"]["measured_us"] is None


def test_a_projection_holds_model_points_and_scenarios(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, ...]] = []

    def timed(specs: list[Spec], cases: list[dict[str, Any]], plan: Plan, **_: Any) -> list[dict[str, Any]]:
        seen.append((*specs[0].settings["set"], specs[0].settings["dtype"]))
        us = {"kernel": 10.0, "hash": 4.0}
        return [
            {"contender": spec.name, "batch": case["batch"], "us_median": us[spec.name] * case["batch"]}
            for spec in specs
            for case in cases
        ]

    monkeypatch.setattr(projected, "measure", timed)
    layer = LayerBenchArgs(d=32, set=("tables=16", "bits=3", "projection.block=32"), batch=(1, 64), threads=1)
    rows = [{"contender": "torch-fp32", "phase": "whole", "batch": 64, "us_median": 6400.0}]
    machine = Roofline(threads=1, gflops={"fp32": 100.0}, gb_per_s={"L1": 400.0, "L2": 100.0, "memory": 10.0})
    found = projected.project(layer, rows, machine, tmp_path, lambda line: None)
    assert len(seen) == len(set(seen)) == 5
    assert len(found["model"]["points"]) == 2 * 2 * 5
    assert set(found["model"]["errors_left_out"]) == {"hash", "gather"}
    assert json.loads(json.dumps(found)) == found
    now = {row["batch"]: row for row in found["scenarios"] if row["scenario"] == "now"}
    assert now[64]["us"] == 640.0
    assert now[64]["speed_up"] == 10.0
    assert now[1]["speed_up"] is None


def test_variants_change_one_field_and_keep_the_others() -> None:
    layer = LayerBenchArgs(d=32, set=("tables=16", "bits=3", "projection.block=32"), batch=(1, 64))
    built = check_projectable(layer)
    found = variants(layer, built)
    assert found[0] == layer
    assert found[1].set == ("tables=16", "bits=3", "projection.block=16")
    assert found[2].set == ("bits=3", "projection.block=32", "tables=8")
    assert found[3].dtype == "bf16"
    assert shape_of(layer, built, 1).copies == 12
    assert shape_of(layer, built, 64).block == 32
    wrong: tuple[dict[str, Any], ...] = (
        {"method": "tree", "set": ("depth=2",)},
        {"set": ("tables=4", "projection.kind=dense")},
    )
    for refused in wrong:
        with pytest.raises(ConfigError):
            check_projectable(LayerBenchArgs(d=32, **refused))
