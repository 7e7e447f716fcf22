"""The whole search on a tiny encoder: what it finds, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_tune
from tiny_tune import TEXTS, MadeUp, dense, made_up, tune
from transformers import AutoModel

import nogemm
import people
from nogemm.bench import peers
from nogemm.train.errors import DivergedError
from nogemm.tune import space as space_module
from nogemm.tune import training

__all__ = ["made_up"]  # a fixture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense(tmp_path_factory.mktemp("tune") / "dense")


def test_the_best_within_a_latency_is_found_and_every_rival_stands_beside_it(
    model: Path, tmp_path: Path, made_up: MadeUp
) -> None:
    found = tune(model, tmp_path / "run", latency_ms=0.7)
    report = found.report
    rows = {row["name"]: row for row in report.rows}
    kinds = [row["kind"] for row in report.rows]
    assert report.met
    assert not report.stay_dense
    assert rows[report.chosen]["us_median"] <= 700
    assert kinds.count("dense") == 1
    assert "rival" in kinds
    assert {name.partition(":")[0] for name in rows} >= {"dense, torch-fp32"}
    within = [row for row in report.rows if row["us_median"] <= 700]
    assert rows[report.chosen]["validation"] >= max(row["validation"] for row in within) - 0.002
    assert report.space["size"] == 2 * (4**3 - 1)
    # Made-up times are sums, so that the additive model must meet them.
    assert report.checks["final"]["worst"] < 1e-3
    assert report.checks["latency"]["rows"]
    assert report.checks["quality"]["worst"] < 0.5
    assert report.chosen in report.verdict
    chosen = rows[report.chosen]["candidate"]
    assert found.model.config.num_hidden_layers == len(chosen["kept"])
    assert not found.model.training
    json.dumps(report.to_dict(), allow_nan=False)
    assert str(tmp_path) not in json.dumps(report.to_dict())


def test_the_dense_model_is_the_answer_where_it_meets_the_budget(model: Path, tmp_path: Path, made_up: MadeUp) -> None:
    for budget in ({"latency_ms": 5.0}, {"memory_mb": 10.0}):
        found = tune(model, tmp_path / next(iter(budget)), **budget)
        assert found.report.stay_dense
        assert found.report.verdict.startswith("Staying dense is the answer")
        assert all(row["kind"] == "dense" for row in found.report.rows)  # nothing was trained to know that
    wanted = tune(model, tmp_path / "exact", quality=1.0).report
    assert wanted.stay_dense
    assert len(wanted.rows) > 2


def test_memory_counts_stored_bytes(model: Path, tmp_path: Path, made_up: MadeUp) -> None:
    report = tune(model, tmp_path / "run", memory_mb=0.022).report
    chosen = next(row for row in report.rows if row["name"] == report.chosen)
    assert chosen["bytes"] <= 22_000
    assert report.met


@pytest.mark.parametrize(("budget", "said"), [
    ({"latency_ms": 0.05}, "nothing meets --latency 0.05: the nearest is"),
    ({"memory_mb": 1e-4}, "nothing meets --memory 0.0001: the nearest is"),
])  # fmt: skip
def test_a_budget_that_nothing_meets_names_the_nearest(
    budget: dict[str, float], said: str, model: Path, tmp_path: Path, made_up: MadeUp
) -> None:
    with pytest.raises(nogemm.ConfigError, match=said):
        tune(model, tmp_path / "run", **budget)


@pytest.mark.parametrize(("changes", "said"), [
    ({}, "give one budget.*none was given"),
    ({"quality": 0.9, "latency_ms": 1.0}, "give one budget.*quality=0.9, latency_ms=1.0"),
    ({"quality": 1.5}, "quality must be a number from"),
    ({"quality": 0.9, "engine": "abacus"}, "engine must be one of .*'abacus'"),
    ({"quality": 0.9, "offers": ("wide",)}, "offers must be of .*wide"),
    ({"quality": 0.9, "offers": {"a b": nogemm.NoConfig()}}, "a name of its own without spaces"),
    ({"quality": 0.9, "colour": 3}, "no option 'colour'"),
    ({"quality": 0.9, "shape": (1, 500)}, "takes texts of 40 tokens"),
    ({"quality": 0.9, "distil": {"tokens": 3}}, "distil may not set tokens"),
])  # fmt: skip
def test_wrong_options_are_named(changes: dict[str, Any], said: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(nogemm.ConfigError, match=said):
        tune(model, tmp_path / "run", **changes)


def test_models_that_cannot_be_searched_are_refused(
    model: Path, tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(nogemm.ConfigError, match=r"config\.json"):
        tune(tmp_path / "nowhere", quality=0.9)
    with pytest.raises(nogemm.ConfigError, match=r"GPT2LMHeadModel.*encoders alone"):
        tune(people.gpt2(tmp_path / "gpt2"), quality=0.9)
    monkeypatch.setattr(space_module, "sites", lambda model: [])
    with pytest.raises(nogemm.ConfigError, match="no dense FFN that can be converted"):
        tune(model, quality=0.9)


def test_data_that_is_empty_or_tiny_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(nogemm.DataError, match=r"empty.txt holds no text"):
        tune(model, data=tmp_path / "empty.txt", quality=0.9)
    (tmp_path / "few.txt").write_text("\n".join(TEXTS[:10] * 9))  # the same ten again are ten
    with pytest.raises(nogemm.DataError, match=r"few.txt holds 10 different texts, tune needs at least 40"):
        tune(model, data=tmp_path / "few.txt", quality=0.9)
    with pytest.raises(nogemm.DataError, match=r"nothing\.txt"):
        tune(model, data=tmp_path / "nothing.txt", quality=0.9)


def test_an_engine_that_fails_is_a_row_and_one_that_was_asked_for_an_error(
    model: Path, tmp_path: Path, made_up: MadeUp
) -> None:
    made_up.faults = {"dense, torch-int8": "does not match the reference"}
    both = {"rivals": ("torch-fp32", "torch-int8"), "latency_ms": 0.7}
    report = tune(model, tmp_path / "run", **both).report
    row = next(row for row in report.rows if row["name"] == "dense, torch-int8")
    assert row["us_median"] is None
    assert row["error"] == "does not match the reference"
    with pytest.raises(nogemm.ConfigError, match=r"torch-int8 does not run this model: does not match"):
        tune(model, tmp_path / "other", engine="torch-int8", **both)


def test_an_engine_that_is_absent_says_what_to_install(
    model: Path, tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "missing", lambda name: f"{name} not installed: pip install 'nogemm[peers]'")
    with pytest.raises(nogemm.ConfigError, match=r"--engine openvino-int8: openvino-int8 not installed: pip install"):
        tune(model, tmp_path / "run", quality=0.9, engine="openvino-int8")


def test_a_candidate_whose_loss_is_not_finite_is_given_up(
    model: Path, tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil, calls = training.distil, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 1:
            raise DivergedError("stopped after 9 tokens: the loss is nan: lower the learning rates")
        return distil(*args, **kwargs)

    monkeypatch.setattr(training, "distil", broken)
    report = tune(model, tmp_path / "run", latency_ms=0.7).report
    assert any("was given up: stopped after 9 tokens" in note for note in report.notes)
    assert report.met


@pytest.mark.parametrize("finite", [True, False])
def test_a_winner_whose_loss_is_not_finite_in_full_leaves_its_place_to_the_next(
    finite: bool, model: Path, tmp_path: Path, made_up: MadeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    distil, full = training.distil, []

    def broken(*args: Any, **kwargs: Any) -> Any:
        if kwargs["options"].tokens == 500:
            full.append(None)
            if not finite or len(full) == 1:
                raise DivergedError("stopped after 9 tokens: the gradient is inf")
        return distil(*args, **kwargs)

    monkeypatch.setattr(training, "distil", broken)
    report = tune(model, tmp_path / "run", latency_ms=0.7).report
    assert any("was given up: stopped after 9 tokens" in note for note in report.notes)
    winners = [row for row in report.rows if row["kind"] == "candidate" and row["training"] == "full"]
    assert len(winners) == int(finite)
    again = tune(model, tmp_path / "run", latency_ms=0.7, resume=True).report
    assert again.chosen == report.chosen


@pytest.mark.slow
def test_candidates_with_and_without_layers_of_ours_run_in_workers(model: Path, tmp_path: Path) -> None:
    small = {"offers": ("none",), "shortlist": 2, "checked": 0, "threads": 1}
    report = tune(model, tmp_path / "run", quality=0.5, **small).report
    assert report.notes == []  # nothing was refused, a sample with token tables neither
    assert "table" in report.latency["torch-fp32"]["parts"]
    trained = [row for row in report.rows if row["kind"] in ("candidate", "rival")]
    assert all(row["verified"] and row["us_median"] > 0 and row["agreement"] is not None for row in trained)
    assert report.checks["final"]["rows"]


def test_an_offer_that_an_engine_does_not_run_leaves_the_search(model: Path, tmp_path: Path, made_up: MadeUp) -> None:
    made_up.faults = {"none": "no such operator"}
    report = tune(model, tmp_path / "run", latency_ms=0.7).report
    assert any("none was not timed in torch-fp32: no such operator" in note for note in report.notes)
    assert any("none is not searched in torch-fp32" in note for note in report.notes)
    assert all("none" not in row["name"] for row in report.rows)


def test_the_time_budget_cuts_the_short_runs(model: Path, tmp_path: Path, made_up: MadeUp) -> None:
    report = tune(model, tmp_path / "run", latency_ms=0.7, max_seconds=1).report
    assert any("Time ran out" in note for note in report.notes)
    assert report.met


def test_the_command_writes_a_model_a_table_and_a_report(
    model: Path, tmp_path: Path, made_up: MadeUp, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    words = ["tune", model, tmp_path / "out", "--data", tmp_path / "texts.txt", "--latency", 0.7, "--shape", "1x8"]
    words += ["--offers", "narrow-4,none", "--engine", "torch-fp32", "--tokens", 500, "--json", tmp_path / "tune.json"]
    for name in ("rivals", "static", "shortlist", "short_tokens", "fit_tokens", "evidence_texts", "checked", "distil"):
        words += ["--option", f"{name}={json.dumps(tiny_tune.TINY[name])}"]
    assert people.run(*words) == 0
    out = capsys.readouterr().out
    assert "meets --latency 0.7" in out
    assert "chosen" in out
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    result = json.loads((tmp_path / "tune.json").read_text())
    chosen = next(row for row in result["rows"] if row["name"] == result["chosen"])
    assert loaded.config.num_hidden_layers == len(chosen["candidate"]["kept"])
    assert people.run("report", tmp_path / "tune.json", "-o", tmp_path / "page.html") == 0
    page = (tmp_path / "page.html").read_text()
    assert "Agreement against time" in page
    assert "Search: dense, the best within 0.7 ms" in page
    assert people.run(*words) == 2
    assert "--resume" in capsys.readouterr().err


def test_the_command_says_what_is_wrong_in_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        ((), "give one budget"),
        (("--quality", "0.9", "--shape", "8"), "--shape '8'"),
        (("--quality", "0.9", "--data", "nothing.txt"), "nothing.txt"),
        (("--quality", "0.9", "--option", "colour=3"), "no option 'colour'"),
    ):
        assert people.run("tune", model, tmp_path / "out", *words) == 2
        err = capsys.readouterr().err.strip().splitlines()
        assert said in err[-1]
    assert not (tmp_path / "out").exists()
