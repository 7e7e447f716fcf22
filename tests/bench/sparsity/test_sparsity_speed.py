"""Time of a site's HireFFN: what is timed is the site's own layer, what is predicted follows from bytes and peaks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import nogemm
from decoders import make
from nogemm.bench.contenders.layer import COPIES
from nogemm.bench.contenders.site import SiteContender, SiteDense, store
from nogemm.bench.engine.measure import Plan, trial_runs
from nogemm.bench.engine.pool import write_pool
from nogemm.bench.sparsity import speed
from nogemm.bench.sparsity.layer import Found, describe
from nogemm.bench.sparsity.speed import measure_speed, predictions
from nogemm.convert.sites import Site
from nogemm.hardware.roofline import Roofline

KEEP = 0.25


@pytest.fixture
def measured() -> tuple[Site, Found, torch.Tensor]:
    """Describe the first FFN of a small gated decoder, D 24, F 48."""
    torch.manual_seed(0)
    site = nogemm.sites(make("llama"))[0]
    x = torch.randn(64, site.d_in)
    found = describe(site, x, [8] * 8, keep=(KEEP,), sketches=("int8",), batch=(1, 4), seed=0)
    return site, found, x


def settings(site: Site, found: Found, x: torch.Tensor, folder: Path) -> dict[str, Any]:
    write_pool(folder / "tokens", 2048, site.d_in, seed=1, source_ND=x)
    store(found.layer, folder / "weights")
    config = {"keep": KEEP, "sketch": "int8", "oversample": 1.5}
    common = {"pool": str(folder / "tokens"), "d": site.d_in, "hidden": site.hidden, "activation": site.activation}
    ours = {"weights": str(folder / "weights"), "config": config, "shape": asdict(site.shape), "dtype": "fp32"}
    return common | ours | {"gated": True, "seed": 0, "engine": "torch-fp32"}


def test_the_sites_own_layer_is_timed_in_twelve_copies(measured: Any, tmp_path: Path) -> None:
    site, found, x = measured
    chosen = settings(site, found, x, tmp_path)
    contender = SiteContender(chosen)
    assert torch.equal(contender.layer.up, site.weights()["up.weight"])  # type: ignore[attr-defined]
    for batch in (1, 32):
        facts = contender.prepare({"batch": batch, "cache": "fresh"})
        assert facts["verified"], facts
        assert facts["layers"] == COPIES
    dense = SiteDense(chosen)
    facts = dense.prepare({"batch": 32, "cache": "fresh"})
    assert facts["verified"]
    assert facts["layers"] == COPIES


def test_other_weights_than_the_packed_are_noticed(measured: Any, tmp_path: Path) -> None:
    site, found, x = measured
    contender = SiteContender(settings(site, found, x, tmp_path))
    pack = contender._pack

    def broken() -> Any:
        with torch.no_grad():
            contender.layer.down[0] += 1.0  # type: ignore[attr-defined, index]
        packed = pack()
        with torch.no_grad():
            contender.layer.down[0] -= 1.0  # type: ignore[attr-defined, index]
        return packed

    contender._pack = broken  # type: ignore[method-assign]
    assert not contender.prepare({"batch": 8, "cache": "fresh"})["verified"]


def test_rows_name_what_is_kept_and_the_dense_time(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site, found, x = measured
    found.candidates[0.5] = 24

    def fake(specs: Any, cases: Any, plan: Any, **_: Any) -> Any:
        times = {"torch-fp32": 30.0, "nogemm-fp32 keep 0.25": 10.0}
        assert [spec.settings["config"]["oversample"] for spec in specs[:-1]] == [found.candidates[KEEP] / 12, 1.0]
        return [
            {"contender": spec.name, **case, "verified": True}
            | ({"us_median": times[spec.name]} if spec.name in times else {"error": "no"})
            for case in cases
            for spec in specs
        ]

    monkeypatch.setattr(speed, "measure", fake)
    plan = Plan(threads=1)
    rows = measure_speed(site, found, x, dtype="fp32", batch=(1,), plan=plan, seed=0, note=lambda line: None)
    assert [(row["keep"], row["us_median"], row["speed_up"]) for row in rows] == [
        (0.25, 10.0, 3.0),
        (0.5, None, None),
        (None, 30.0, 1.0),
    ]


def test_predictions_follow_from_bytes_and_peaks(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site, found, _ = measured
    monkeypatch.setattr(speed, "weight_level", lambda size: "memory")
    found.candidates[KEEP] = 18
    found.touched.clear()
    found.touched.update({(KEEP, 1): (12.0, 18.0), (KEEP, 4): (30.0, 40.0)})
    slow_memory = Roofline(threads=1, gflops={"fp32": 1e6, "int8": 1e6}, gb_per_s={"memory": 1.0})
    one, four = predictions(site, found, slow_memory, dtype="fp32", batch=(1, 4))
    weights = 3 * 24 * 48
    # The dense layer's weights and biases; the sketch's 48 x 24 bytes and the rows that are touched.
    assert one["dense_us"] == pytest.approx((weights * 4 + 4 * (24 + 48)) * 1e-3)
    assert one["us"] == pytest.approx((48 * 24 + 4 * (18 * 24 + 12 * 48)) * 1e-3)
    assert four["us"] == pytest.approx((48 * 24 + 4 * (40 * 24 + 30 * 48)) * 1e-3)
    assert one["speed_up"] == one["dense_us"] / one["us"]
    assert (one["bound"], four["batch"]) == ("memory", 4)
    slow_products = Roofline(threads=1, gflops={"fp32": 1e-3, "int8": 1.0}, gb_per_s={"memory": 1e6})
    one, four = predictions(site, found, slow_products, dtype="fp32", batch=(1, 4))
    assert one["dense_us"] == pytest.approx(2 * weights)
    assert four["us"] == pytest.approx(4 * 2 * (18 * 24 + 12 * 48))
    assert four["bound"] == "fp32 compute"
    assert len(predictions(site, found, slow_memory, dtype="fp32", batch=(4,))) == 1


@pytest.mark.slow
def test_a_layer_is_timed_beside_the_dense_one(measured: Any) -> None:
    site, found, x = measured
    plan = Plan(threads=1, rounds=2, seconds=0.001)
    with trial_runs():
        rows = measure_speed(site, found, x, dtype="fp32", batch=(1, 4), plan=plan, seed=0, note=lambda line: None)
    assert [row["verified"] for row in rows] == [True] * 4
    assert all(row["us_median"] > 0 and row["speed_up"] > 0 for row in rows)
