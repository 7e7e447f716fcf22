"""`nogemm profile` end to end on a tiny shape: phases, sources of events, refusals."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nogemm.bench.contenders.layer import our_layer
from nogemm.bench.engine.pool import write_pool
from nogemm.bench.layer import LayerBenchArgs
from nogemm.bench.profile import profile as bench
from nogemm.bench.profile.counts import Counts
from nogemm.bench.profile.job import (
    FIRST,
    WHOLE,
    PhaseContender,
    SketchContender,
    join_small,
    operator_times,
)
from nogemm.bench.profile.profile import ProfileArgs, run_profile
from nogemm.bench.profile.rows import phase_rows, roofline_points
from nogemm.bench.profile.tables import energy_table, profile_table
from nogemm.bench.report.profile import profile_charts
from nogemm.errors import ConfigError, NativeError
from nogemm.hardware.roofline import Roofline
from nogemm.layers._base import Kernel
from nogemm.layers.hire.packed import PackedHire
from nogemm_papers.projected import FIGURES

TINY: dict[str, Any] = {
    "d": 32,
    "set": ("tables=16", "bits=3", "projection.block=8"),
    "batch": (1, 300),
    "threads": 1,
    "rounds": 2,
    "seconds": 0.01,
    "against": ("torch-fp32",),
    "pool_cap_bytes": 1 << 20,
}
COUNTS = Counts(
    instructions=9e3,
    multiply_adds=1e3,
    accesses=2e3,
    access_bytes=4e4,
    l1_misses=100.0,
    l2_misses=10.0,
    llc_misses=1.0,
    tlb_misses=5.0,
)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Roofline(threads=1, gflops={"fp32": 100.0}, gb_per_s={"L1": 100.0, "L2": 50.0, "L3": 20.0, "memory": 5.0})
    monkeypatch.setattr(bench, "measure_rooflines", lambda threads: {bench.origin({})["isa"]: machine})


def profiled(**change: Any) -> dict[str, Any]:
    counters, counts = change.pop("counters", "none"), change.pop("counts", None)
    args = ProfileArgs(layer=LayerBenchArgs(**(TINY | change)), counters=counters, counts=counts)
    return run_profile(args, figures=FIGURES)


@pytest.mark.usefixtures("quick")
def test_phases_add_up_to_the_call() -> None:
    result = profiled()
    assert json.loads(json.dumps(result))["rows"] == result["rows"]
    assert result["phases"] == ["hash", "gather"]
    for batch in (1, 300):
        us = {
            row["phase"]: row["us_median"]
            for row in result["rows"]
            if row["batch"] == batch and "nogemm" in row["contender"]
        }
        assert list(us) == ["whole", "kernel", "hash", "gather", "rest"]
        # Which of two measured times is the longer one is noise at this size; what is left of them adds up in any case.
        assert min(us["hash"], us["kernel"], us["whole"]) > 0
        assert us["hash"] + us["gather"] == pytest.approx(us["kernel"])
        assert us["kernel"] + us["rest"] == pytest.approx(us["whole"])
    dense = [row for row in result["rows"] if row["contender"] == "torch-fp32"]
    assert [row["us_median"] > 0 for row in dense] == [True, True]
    assert result["counting"]["source"] is None
    for row in result["rows"]:
        assert row["why_not"] == "not asked for"
        assert row["l1_miss_rate"] is None
    assert len(profile_table(result).rows) == len(result["rows"])
    assert energy_table(result).rows == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("method", "fields", "phases"),
    [
        ("tree", ("depth=4",), ["descent", "sum"]),
        ("hire", ("keep=0.25",), ["sketch", "rows"]),
        pytest.param("hire", ("keep=1.0",), [], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.slow), "int8"])
def test_other_layers_have_their_own_phases(
    method: str, fields: tuple[str, ...], phases: list[str], dtype: str
) -> None:
    result = profiled(method=method, set=fields, dtype=dtype, hidden=64, batch=(4,), against=())
    assert result["phases"] == (phases or None)
    assert [row["phase"] for row in result["rows"]] == ["whole", "kernel", *phases, "rest"]
    us = {row["phase"]: row["us_median"] for row in result["rows"]}
    assert None not in us.values()
    if phases:
        assert us[phases[0]] + us[phases[1]] == pytest.approx(us["kernel"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("method", "fields", "operator"),
    [
        ("switch", ("experts=2",), "op:aten::gelu"),
        pytest.param("yoso", ("hashes=4", "bits=3"), "op:nogemm::packed_lookup", marks=pytest.mark.slow),
        pytest.param("slide", ("tables=2", "bits=3"), "op:nogemm::hash_codes", marks=pytest.mark.slow),
        pytest.param("leaf_tree", ("depth=2", "leaf_width=4"), "op:nogemm::tree_descend", marks=pytest.mark.slow),
        pytest.param("dense", (), "op:aten::addmm", marks=pytest.mark.slow),
    ],
)
def test_a_layer_of_several_operators_has_a_row_for_each(method: str, fields: tuple[str, ...], operator: str) -> None:
    result = profiled(method=method, set=fields, hidden=64, batch=(4, 200), against=())
    for batch in (4, 200):
        rows = [row for row in result["rows"] if row["batch"] == batch]
        us = {row["phase"]: row["us_median"] for row in rows}
        assert operator in us
        assert (rows[0]["phase"], rows[-1]["phase"]) == ("whole", "rest")
        assert sum(us.values()) == pytest.approx(2 * us["whole"])
        for row in rows[1:-1]:
            assert (row["source"], row["counted"], row["l1_miss_rate"]) == ("torch profiler", False, None)
            assert "profiler" in row["why_not"]
            assert 0 <= row["us_p10"] <= row["us_median"] <= row["us_p90"]
    assert len(profile_table(result).rows) == len(result["rows"])
    assert len(profile_charts(result)) == 2


class TwoOperators:
    """Draws nothing, and multiplies three times and adds once."""

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        return {"verified": True}

    def draw(self) -> torch.Tensor:
        return torch.rand(300, 300).sin()

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs @ inputs @ inputs @ inputs + 1


def test_operators_are_those_of_the_calls_alone() -> None:
    contender = TwoOperators()
    start = time.perf_counter()
    found = operator_times(contender, 1)
    elapsed = 1e6 * (time.perf_counter() - start)
    assert "op:aten::sin" not in found, "drawing is not the layer's"
    assert "op:aten::mm" in found
    assert {len(us) for us in found.values()} == {len(found["op:aten::mm"])}
    assert len(found["op:aten::mm"]) >= 3
    assert 0 < sum(map(sum, found.values())) < elapsed


def test_small_operators_are_added_up() -> None:
    times = {"op:a": [1.0, 2.0, 999.0], "op:b": [900.0] * 3, "op:c": [0.0, 3.0, 1.0], "op:d": [100.0, 50.0, 20.0]}
    assert list(join_small(times).items()) == [
        ("op:b", [900.0, 900.0, 900.0]),
        ("op:d", [100.0, 50.0, 20.0]),
        ("op:others", [1.0, 5.0, 1000.0]),
    ]
    assert "op:others" not in join_small({"op:b": [900.0]})


def test_a_sketch_that_misses_what_answers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pool(tmp_path / "tokens", 400, 32, seed=1)
    settings = {"method": "hire", "set": ["keep=0.25"], "d": 32, "hidden": 64, "activation": "gelu", "seed": 0}
    settings |= {"dtype": "int8", "pool": str(tmp_path / "tokens"), "events": False, "path": "rows"}
    contender = SketchContender(settings)
    case = {"batch": 16, "cache": "fresh"}
    assert contender.prepare(case)["verified"] is True
    (mask,) = contender.run(contender.draw())
    assert (mask.shape, mask.dtype) == ((16, 64), torch.bool)
    assert 16 <= mask.sum(1).min() < 64
    honest = PackedHire.chosen_neurons

    def without(packed: PackedHire, x: torch.Tensor, *, kept: bool) -> torch.Tensor:
        found = honest(packed, x, kept=kept)
        return found if kept else torch.zeros_like(found)

    monkeypatch.setattr(PackedHire, "chosen_neurons", without)
    assert contender.prepare(case)["error"] == "neurons answer that are not among the candidates"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.slow), "int8"])
@pytest.mark.parametrize(
    ("method", "fields", "counted"),
    [
        ("lookup", TINY["set"], {"kernel", "hash", "gather"}),
        pytest.param("tree", ("depth=3",), {"kernel", "descent", "sum"}, marks=pytest.mark.slow),
        pytest.param("hire", ("keep=0.25",), {"kernel"}, marks=pytest.mark.slow),
    ],
)
def test_narrow_layers_are_simulated_where_their_kernel_stops(
    method: str, fields: tuple[str, ...], counted: set[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Valgrind itself runs in tests/extra; here it answers with counts made up."""
    monkeypatch.setattr(bench, "choose_source", lambda wanted: bench.Source("cachegrind", ""))
    monkeypatch.setattr(bench.counting, "count_program", lambda: Path("count_calls"))
    asked: list[list[str]] = []

    def simulate(commands: Sequence[Callable[[bool], Sequence[str]]], g: Any) -> list[Counts]:
        words = list(commands[0](True))
        asked.append(words[1:3])
        return [COUNTS.scaled(1.0), COUNTS.scaled(3.0 if words[2] == "0" else 2.0)]

    monkeypatch.setattr(bench.counting, "simulate", simulate)
    result = profiled(counters="cachegrind", method=method, set=fields, dtype=dtype, hidden=64, batch=(16,), against=())
    assert {row["phase"] for row in result["rows"] if row["counted"]} == counted
    assert {row["phase"] for row in result["energy"]["rows"]} == counted
    assert {point["phase"] for point in result["points"]} <= counted
    kind = {"lookup": "0", "tree": "1", "hire": "2"}[method]
    assert asked == [[kind, str(phase)] for phase in ((WHOLE,) if method == "hire" else (WHOLE, FIRST))]
    why = {row["phase"]: row["why_not"] for row in result["rows"] if not row["counted"]}
    assert why["rest"].startswith("Python and torch")
    if method == "hire":
        assert (
            why["sketch"] == why["rows"] == "the kernel cannot be stopped between its phases, so they are not simulated"
        )


@pytest.mark.usefixtures("quick")
def test_counts_of_an_earlier_result_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "choose_source", lambda wanted: bench.Source("cachegrind", ""))
    monkeypatch.setattr(bench.counting, "simulate_phases", _no_simulation)
    monkeypatch.setattr(bench.counting, "simulate_dense", _no_simulation)
    keys = [("nogemm-fp32", phase) for phase in ("kernel", "hash", "gather")] + [("dense-numpy-fp32", "kernel")]
    counts = [
        {"contender": name, "phase": phase, "batch": batch, **COUNTS.to_dict()}
        for name, phase in keys
        for batch in (1, 300)
    ]
    settings = json.loads(json.dumps(vars(LayerBenchArgs(**TINY)))) | {"hidden": 128}
    settings["set"].reverse()  # the order of fields says nothing
    earlier = {"kind": "profile", "counting": {"source": "cachegrind"}, "counts": counts, "settings": settings}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    result = profiled(counters="cachegrind", counts=str(tmp_path / "earlier.json"))
    rows = {(row["contender"], row["phase"], row["batch"]): row for row in result["rows"]}
    row = rows["nogemm-fp32", "hash", 300]
    assert row["l1_miss_rate"] == 0.05
    assert row["l1_gb_per_s"] == pytest.approx(4e4 / row["us_median"] * 1e-3)
    assert rows["nogemm-fp32", "rest", 300]["why_not"].startswith("Python and torch")
    assert {point["phase"] for point in result["points"]} == {"kernel", "hash", "gather"}
    assert all("dense_ratio" in row for row in result["energy"]["rows"] if row["contender"] == "nogemm-fp32")

    (tmp_path / "other.json").write_text(json.dumps(earlier | {"settings": settings | {"d": 64}}))
    with pytest.raises(ConfigError, match="its d is 64, not 32"):
        profiled(counters="cachegrind", counts=str(tmp_path / "other.json"))
    (tmp_path / "none.json").write_text(json.dumps({"kind": "layer", "rows": []}))
    with pytest.raises(ConfigError, match="not a profile"):
        profiled(counters="cachegrind", counts=str(tmp_path / "none.json"))


def _no_simulation(*_: Any, **__: Any) -> dict[Any, Any]:
    raise AssertionError("everything was in the file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counters": "guess"}, "--counters must be one of auto, perf, cachegrind, none, got 'guess'"),
        ({"dtype": "fp32,int8"}, "--dtype must be one of fp32, bf16, int8 for a profile"),
        ({"method": "magic"}, "unknown layer kind 'magic'"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        profiled(**change)


def test_a_source_asked_for_by_name_must_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "why_no_counters", lambda: "this machine does not count it")
    monkeypatch.setattr(bench, "why_no_simulator", lambda: "valgrind is not installed")
    with pytest.raises(NativeError, match="--counters perf: this machine does not count it"):
        bench.choose_source("perf")
    nothing = bench.choose_source("auto")
    assert nothing.name is None
    assert nothing.why_not == "perf: this machine does not count it; cachegrind: valgrind is not installed"
    monkeypatch.setattr(bench, "why_no_simulator", lambda: None)
    assert bench.choose_source("auto").name == "cachegrind"


def test_a_native_entry_that_differs_from_the_module_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pool(tmp_path / "tokens", 400, 32, seed=1)
    settings = {"method": "lookup", "set": TINY["set"], "d": 32, "hidden": 128, "activation": "gelu", "seed": 0}
    settings |= {"dtype": "fp32", "pool": str(tmp_path / "tokens"), "events": False, "phase": WHOLE}
    contender = PhaseContender(settings)
    case = {"batch": 16, "cache": "fresh"}
    assert contender.prepare(case)["verified"] is True
    assert contender.timed(contender.draw()) > 0
    honest = contender.timed

    def wrong(inputs: Any) -> float:
        seconds = honest(inputs)
        contender.outputs[0][3, 5] += 1.0
        return seconds

    monkeypatch.setattr(contender, "timed", wrong)
    facts = contender.prepare(case)
    assert facts["verified"] is False
    assert facts["error"] == "the native entry does not match the module"


def test_the_first_phase_writes_no_output(tmp_path: Path) -> None:
    write_pool(tmp_path / "tokens", 1000, 32, seed=1)
    settings = {"method": "tree", "set": ["depth=3"], "d": 32, "hidden": 64, "activation": "gelu", "seed": 0}
    settings |= {"dtype": "bf16", "pool": str(tmp_path / "tokens"), "events": False, "phase": FIRST}
    contender = PhaseContender(settings)
    for batch in (1, 100):
        assert contender.prepare({"batch": batch, "cache": "fresh"})["verified"] is True
        contender.timed(contender.draw())
        assert not any(y.any() for y in contender.outputs)


def test_only_single_native_calls_have_a_kind() -> None:
    shape = {"d": 32, "hidden": 64, "activation": "gelu", "seed": 0}
    lookup = our_layer(shape | {"method": "lookup", "set": TINY["set"]}).pack("int8")
    assert lookup.kernel == Kernel(number=0, phases=("hash", "gather"))
    assert our_layer(shape | {"method": "switch", "set": ["experts=2"]}).pack().kernel is None


def test_points_and_rows_by_hand() -> None:
    machine = Roofline(threads=1, gflops={"fp32": 100.0}, gb_per_s={"L1": 100.0, "L2": 50.0, "L3": 20.0, "memory": 5.0})
    timed = [
        {"contender": name, "batch": 4, "us_median": us, "us_p10": us, "us_p90": us}
        for name, us in (("ours", 5.0), ("ours kernel", 3.0), ("ours hash", 1.0))
    ]
    counted = {("ours", "gather", 4): COUNTS}
    rows = phase_rows(timed, "ours", ("hash", "gather"), counted, machine, {"source": "cachegrind"})
    assert [(row["phase"], row["us_median"]) for row in rows] == [
        ("whole", 5.0),
        ("kernel", 3.0),
        ("hash", 1.0),
        ("gather", 2.0),
        ("rest", 2.0),
    ]
    (point,) = roofline_points(rows, counted, machine)
    # 2000 FLOP in 2 us; L1 40000 bytes at 100 GB/s are 0.4 us, the longest of all parts.
    assert point["gflops"] == pytest.approx(1.0)
    assert (point["bound"], point["roofline_fraction"]) == ("L1", pytest.approx(0.2))
    assert point["intensity"]["L1"] == pytest.approx(0.05)
    assert roofline_points(rows, counted, None) == []
