"""Everything that is wrong with a study file is said before the first run starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_study import ROWS, TEXT, faked, write

import nogemm
from nogemm.errors import ConfigError
from nogemm.study.plan import read_study
from nogemm.study.sources import Source


def test_a_study_is_read(tmp_path: Path) -> None:
    text = TEXT + ROWS + "search: {rates: [5e-3, 1e-2], options: {steps: 2}}\nbaseline: dense\n"
    plan = read_study(write(tmp_path, text + "grid: [{method: no, options: {lr: [1e-3, 2e-3]}}]\n"))
    assert [row.name for row in plan.rows] == ["dense", "lookup", "no-0.001", "no-0.002"]
    assert plan.rows[0].layer == nogemm.DenseConfig()
    assert plan.rows[1].options.ffn == nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(block=8))
    assert plan.rows[3].options.lr == 2e-3
    assert plan.rows[0].search is not None
    assert plan.rows[0].search.factors == (0.5, 1.0)
    assert plan.rows[3].search is not None
    assert plan.rows[3].search.factors == (2.5, 5.0)
    assert (plan.seeds, plan.baselines, plan.name) == ((0, 1), {"": "dense"}, "small")
    assert plan.rows[0].source == Source(data="sample")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TEXT + ROWS + "sead: 3", "unknown key 'sead'; did you mean 'seeds'?"),
        (TEXT + "rows: [{name: a, metod: no}]", "row 1: unknown key 'metod'; did you mean 'method'?"),
        (TEXT + "rows: [{name: a, options: {stepz: 3}}]", "row 1 'a': options: unknown key 'stepz'; did you mean 'st"),
        (TEXT.replace("dropout", "dropuot") + ROWS, "common: unknown key 'dropuot'; did you mean 'dropout'?"),
        (TEXT + "rows: [{name: a, options: {seed: 3}}]", "unknown key 'seed'"),
        (TEXT + "rows: [{name: a}, {name: b}, {name: a, method: no}]", "row 3: the row 'a' stands twice; it is row 1"),
        (TEXT + ROWS + "grid: [{name: lookup, method: no}]", "grid 1: the row 'lookup' stands twice; it is row 2"),
        (TEXT + "rows: [{name: a, options: {lr: -1}}]", "row 1 'a': train: lr must lie between"),
        (TEXT + "rows: [{name: a, options: {lr: fast}}]", "row 1 'a': train: lr must be a number"),
        (TEXT + "rows: [{name: ../a}]", "a row's name must be letters"),
        (TEXT + "rows: [{method: no}]", "a row's name must be letters"),
        (TEXT, "needs rows or a grid"),
        (TEXT + "rows: {a: 1}", "rows: expected a list"),
        (TEXT.replace("seeds: [0, 1]", "seeds: [1, 1]") + ROWS, "seeds must be different whole numbers"),
        (TEXT.replace("kind: train", "kind: trane") + ROWS, "unknown kind 'trane'; did you mean 'train'?"),
        (TEXT + ROWS + "baseline: dence", "baseline 'dence' is no row; did you mean 'dense'?"),
        (TEXT + ROWS + "search: {rates: []}", "rates must be positive numbers"),
        (TEXT + ROWS + "search: {rates: [1e-3], factors: [1]}", "give rates .* or factors"),
        (TEXT + ROWS + "search: {rates: [1e-3], options: {tokns: 3}}", "search: options: unknown key 'tokns'"),
        (TEXT + ROWS + "search: {rates: [1e-3, 1e-3]}", "a rate stands twice"),
        (TEXT + ROWS + "measure: {latency: {dtype: int2}}", "dtype must be one of fp32, bf16, int8"),
        (TEXT + ROWS + "data: gone.txt", "data: no such file: gone.txt"),
        (TEXT + "rows: [{name: a, keep: [0]}]", "layers, keep and fit are for kinds distil and finetune"),
        (TEXT + "rows: [{name: a, method: shuffle, set: {block: 64}}]", "row 'a': ShuffleConfig: block=64 is wider"),
        (TEXT.replace("heads: 2", "heads: 3") + ROWS, "row 1 'dense': train: width=16 is not a multiple of heads=3"),
        (TEXT.replace("layers: 1", "layers: 1, arch: no-such") + ROWS, "arch must be a model type"),
        ("kind: distil\nrows: [{name: a}]", "kind distil needs a model"),
        (
            "kind: distil\nmodel: m\ndata: small.yaml\nrows: [{name: a}]",
            "kind distil compares by agreement: name validation texts",
        ),
        (TEXT + ROWS + "validation: {split: test}", "validation: names no data"),
        (TEXT + ROWS + "tasks: [{name: a, data: x.csv}]", "tasks and test are for kind finetune"),
        (TEXT + "rows: [{name: a, method: null, set: {tables: 4}}]", "set belongs to a method"),
        ("kind: finetune\nrows: [{name: a}]", "kind finetune needs a model"),
        ("kind: finetune\nmodel: {study: s}\nrows: [{name: a}]", "row 1 'a': model: a kept model has a study, a row"),
        ("kind: finetune\nmodel: gone\nrows: [{name: a}]", "row 'a': gone: not a directory with a transformers model"),
        ("kind: finetune\ndata: sample\ntasks: [{name: t}]\nrows: [{name: a}]", "data belong to each of the tasks"),
        ("kind: finetune\ntasks: [{name: t}, {name: t}]\nrows: [{name: a}]", "the task 't' stands twice"),
        ("kind: finetune\ntasks: [{name: t, data: gone.csv}]\nrows: [{name: a}]", "task 1 't': data: no such file"),
        (
            "kind: finetune\nmodel: m\ntasks: [{name: t, options: {lrr: 1}}]\nrows: [{name: a}]",
            "task 't': options: unknown key 'lrr'; did you mean 'lr'",
        ),
        (
            "kind: finetune\nmodel: m\ntasks: [{name: t}, {name: u, options: {task: regress}}]\nrows: [{name: a}]",
            "compared by one metric, got t-a by accuracy, u-a by Pearson's r",
        ),
        ("kind: distil\nmodel: m\npreset: laptop\nrows: [{name: a}]", "preset is for kind train"),
        ("kind: distil\nmodel: m\nsearch: {rates: [1]}\nrows: [{name: a}]", "distil has no rate for all: give factors"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_any_run(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = faked(monkeypatch)
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        nogemm.study(write(tmp_path, text), tmp_path / "out")
    assert fake.jobs == []
    assert not (tmp_path / "out").exists()


def test_files_beside_the_study_are_found(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a text\n")
    plan = read_study(write(tmp_path, TEXT + ROWS + "data: texts.txt\nvalidation: {data: texts.txt, split: test}"))
    texts = str(tmp_path / "texts.txt")
    assert plan.rows[0].source == Source(data=texts, validation=texts, split="test")


STUDIES = sorted((Path(__file__).resolve().parents[2] / "benchmarks" / "studies").glob("*.yaml"))
STUDIES = [file for file in STUDIES if file.stem != "table4"]  # it needs models; tests/study/test_study_finetune.py


@pytest.mark.parametrize("file", STUDIES, ids=[file.stem for file in STUDIES])
def test_the_studies_of_the_project_can_be_read(file: Path) -> None:
    assert read_study(file, data="sample").rows
