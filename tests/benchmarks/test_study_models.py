"""The rows of the recorded study: names of their own, learning rates for all that train, engines on saved models."""

from __future__ import annotations

from benchmark_scripts import load

models = load("study_models")


def test_rows_are_told_apart_and_trained_ones_are_tuned() -> None:
    rows = models.all_rows()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert all(bool(row.tuned_as) == row.trained for row in rows)
    assert {row.tuned_as for row in rows if row.name.startswith("dense213")} == {"dense"}


def test_an_engine_runs_the_teacher_or_a_row_that_is_saved() -> None:
    rows = models.all_rows()
    saved = {f"runs/study-models/{row.name}" for row in rows if row.trained}
    assert {row.source for row in rows if not row.trained} == {models.TEACHER, models.QUARTER_MODEL}
    assert models.QUARTER_MODEL in saved
