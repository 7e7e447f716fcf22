"""The rows of the recorded study: the names that its files bear, engines on models that are saved."""

from __future__ import annotations

from pathlib import Path

from benchmark_scripts import load

models = load("study_models")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_rows_bear_the_names_of_the_recorded_files() -> None:
    names = [row.name for row in models.all_rows()]
    assert len(set(names)) == len(names)
    recorded = {path.stem for path in RESULTS.glob("intel-6-207/study/*.json") if not path.stem.startswith("design")}
    assert recorded == set(names)
    assert {row.of for row in models.all_rows() if row.name.startswith("dense213")} == {"dense213"}


def test_an_engine_runs_the_teacher_or_a_row_that_is_saved() -> None:
    rows = models.all_rows()
    saved = {f"runs/study-models/{row.name}" for row in rows if row.trained}
    assert {row.source for row in rows if not row.trained} == {models.TEACHER, models.QUARTER_MODEL}
    assert models.QUARTER_MODEL in saved
