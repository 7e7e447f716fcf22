"""Rows of fine-tuning: where they come from, how they are split and dealt, and what is wrong with bad ones."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from sklearn.metrics import f1_score
from tiny_finetuning import ROWS, converted, rows, tune

import nogemm
from nogemm.train.task.corpus import Order, numbered
from nogemm.train.task.data import Examples, Labels, read_data
from nogemm.train.task.hub import GLUE
from nogemm.train.task.metrics import document_ranks, figures, measured, wilson
from nogemm.train.task.options import METRICS, finetune_options
from people import bert

SMALL = finetune_options(batch=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("finetune-data") / "model")


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in found))
    return path


def test_jsonl_csv_and_lists_are_the_same_rows(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "rows.jsonl", ROWS)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    options = finetune_options(task="regress", label="score", text2="text2", batch=2)
    found = [read_data(options, data) for data in (ROWS, jsonl, packed, tmp_path / "rows.csv")]
    for part in ("train", "validation"):
        assert len({rows[part].identity() for rows in found}) == 1
    assert read_data(options, rows(80, seed=1))["train"].identity() != found[0]["train"].identity()
    whole = datasets.Dataset.from_list(ROWS)
    assert read_data(options, whole)["train"].identity() == found[0]["train"].identity()


def test_rows_go_to_the_split_that_they_name(tmp_path: Path) -> None:
    named = [{**row, "split": ("train", "validation", "test")[i % 3]} for i, row in enumerate(ROWS)]
    found = read_data(SMALL, named)
    assert {part: len(rows) for part, rows in found.items()} == {"train": 27, "validation": 27, "test": 26}
    other = read_data(SMALL, named, validation=ROWS[:5], test=write(tmp_path / "test.jsonl", ROWS[:7]))
    assert {part: len(rows) for part, rows in other.items()} == {"train": 27, "validation": 5, "test": 7}
    held = read_data(SMALL, ROWS)
    assert "test" not in held
    assert not set(held["train"].texts) & set(held["validation"].texts)
    packages = [
        {
            "name": str(i),
            "section": "admin" if i % 2 else "web",
            "short": "s",
            "long": f"long text {chr(97 + i % 26)}{'x' * i}",
        }
        for i in range(200)
    ]
    debian = read_data(finetune_options(text="long", label="section", batch=2), packages)
    assert len(debian["train"]) > 150
    assert {"validation", "test"} <= debian.keys()


def test_rows_without_a_text_are_left_out_and_counted() -> None:
    found = read_data(SMALL, [*ROWS, {"text": "  ", "label": "good"}])
    assert found["train"].left_out == 1


@pytest.mark.parametrize(
    ("data", "changes", "said"),
    [
        ([], {}, "holds no row to train on"),
        ([{"text": " ", "label": "a"}], {}, "only 1 without a text"),
        (ROWS[:20], {"batch": 32}, r"holds \d+ rows to train on, and a batch takes 32"),
        ([{"text": "one", "label": "a"}], {}, "leave none to validate on"),
        ([{**row, "label": "same"} for row in ROWS], {}, "have the label 'same': nothing to tell apart"),
        ([{"text": "a"}], {}, "row 1 has no field 'label'; it has: text"),
        ([{"text": "a", "label": None}], {}, "row 1, field 'label': null, neither a whole number nor a name"),
        ([{"text": "a", "label": 1.5}], {}, r"field 'label': 1\.5, neither"),
        ([{"text": None, "label": "a"}], {}, "row 1, field 'text': null, not text"),
        (["a text"], {}, "row 1 is plain text"),
        (ROWS, {"task": "regress"}, r"row 1, field 'label': '(good|bad)' is not a number"),
        ([{"text": "a", "label": math.nan}], {"task": "regress"}, "field 'label': nan is not a number"),
        (ROWS, {"task": "pairs", "text2": "second"}, "has no field 'second'"),
        ([{**row, "split": "test"} for row in ROWS], {}, "no row to train on, only 80 of the split 'test'"),
        ("nothing.jsonl", {}, "no such data file: nothing.jsonl"),
        ("glue/sst3", {}, "no such task of GLUE; they are cola, sst2"),
    ],
)
def test_bad_rows_are_named(data: Any, changes: dict[str, Any], said: str, model: Path) -> None:
    with pytest.raises(nogemm.DataError, match=said):
        tune(model, data=data, **changes)


def test_other_labels_in_validation_or_test_are_named(model: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [*ROWS[:3], {"text": "a", "label": "ugly"}])
    for part in ("validation", "test"):
        with pytest.raises(
            nogemm.DataError, match=r"bad\.jsonl: line 4: the label 'ugly' is not one of the 2 .*: bad, good"
        ):
            tune(model, **{part: bad})
    with pytest.raises(nogemm.DataError, match="holds no row to validate on"):
        tune(model, validation=write(tmp_path / "empty.jsonl", []))
    with pytest.raises(nogemm.DataError, match="holds no row to test on"):
        tune(model, test=write(tmp_path / "empty.jsonl", []))


def test_a_head_that_does_not_fit_the_labels_is_refused(model: Path, tmp_path: Path) -> None:
    found = tune(model, steps=1)
    nogemm.save(found.model, tmp_path / "two", tokenizer=found.tokenizer)
    three = [{**row, "label": f"class {i % 3}"} for i, row in enumerate(ROWS)]
    with pytest.raises(
        nogemm.ConfigError, match=r"does not fit the data: .*'class \d'.*0 to 1.*bad, good.*head=\"new\""
    ):
        tune(tmp_path / "two", data=three)
    replaced = tune(tmp_path / "two", data=three, head="new", steps=1)
    assert replaced.report.model["new_head"]
    assert list(replaced.model.config.label2id) == ["class 0", "class 1", "class 2"]
    with pytest.raises(nogemm.ConfigError, match="has 2 classes, and task='regress' wants one number"):
        tune(tmp_path / "two", task="regress", label="score")
    number = tune(model, task="regress", label="score", steps=1)
    nogemm.save(number.model, tmp_path / "number", tokenizer=number.tokenizer)
    with pytest.raises(nogemm.ConfigError, match="gives one number, and the rows have labels"):
        tune(tmp_path / "number")
    with pytest.raises(nogemm.ConfigError, match="BertModel has no classification head"):
        tune(number.model.base_model, tokenizer=number.tokenizer)
    with pytest.raises(nogemm.ConfigError, match="a SentenceTransformer or a directory, got a BertFor"):
        tune(number.model, task="embed")
    with pytest.raises(nogemm.ConfigError, match="not a directory with a transformers model"):
        tune(tmp_path)


def test_nameless_classes_take_the_datas_names(tmp_path: Path) -> None:
    found = tune(bert(tmp_path / "two", "BertForSequenceClassification"), steps=1)
    assert found.model.config.id2label == {0: "bad", 1: "good"}
    assert not found.report.model["new_head"]


def test_whole_numbers_are_ordered_by_value() -> None:
    found = Examples(labels=["10", "9", "-1", "9"], texts=["a"] * 4, where=["row 1"] * 4)
    labels = Labels.of(found)
    assert labels.names == ("-1", "9", "10")
    assert labels.numbers(found) == [2, 1, 0, 1]


@pytest.mark.parametrize(("given", "said"), [
    ({"task": "nli"}, "task must be one of classify, pairs, regress, embed"),
    ({"metric": "pearson"}, "the metrics of task='classify' are accuracy, macro_f1, matthews, got 'pearson'"),
    ({"epochs": 0.0}, "epochs must lie between"),
    ({"lr_head": -1.0}, "lr_head must lie between"),
    ({"text2": "b"}, 'names a second text, which task="pairs" reads'),
    ({"task": "embed", "label": "x"}, 'task="embed" has no labels'),
    ({"pooling": "mean"}, 'pooling is for task="embed"'),
    ({"task": "embed", "pooling": "middle"}, "pooling must be one of"),
    ({"learning_rate": 1.0}, "finetune has no option 'learning_rate'"),
    ({"text": 3}, "text must be the name of a field"),
])  # fmt: skip
def test_wrong_options_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(nogemm.ConfigError, match=said):
        finetune_options(**given)


def test_a_run_without_a_budget_takes_three_epochs() -> None:
    assert finetune_options().epochs == 3.0
    assert finetune_options(steps=5).epochs is None


@pytest.mark.parametrize(("count", "batch"), [(64, 8), (67, 8), (9, 8), (1000, 16)])
def test_an_epoch_holds_every_row_once(count: int, batch: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 90, count)
    order = Order(lengths, batch, seed=1)
    steps = -(-3 * count // batch)
    dealt = np.concatenate([order.rows(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(dealt[epoch * count : (epoch + 1) * count]) == list(range(count))
    again = Order(lengths, batch, seed=1)
    assert again.rows(steps - 1).tolist() == order.rows(steps - 1).tolist()  # asked for alone, as after a resume
    other = np.concatenate([Order(lengths, batch, seed=2).rows(step) for step in range(steps)])
    assert other.tolist() != dealt.tolist()


def test_rows_of_similar_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(3, 90, 1600)
    padding = {}
    for name, order in (("sorted", Order(lengths, 16, seed=0)), ("mixed", Order(np.full(1600, 9), 16, seed=0))):
        padding[name] = sum(int(lengths[order.rows(step)].max()) * 16 for step in range(100)) / lengths.sum()
    assert padding["sorted"] < 1.1
    assert padding["mixed"] > 1.5


def test_equal_texts_are_kept_out_of_one_batch() -> None:
    first, second = [f"query {i}" for i in range(64)], [f"document {i % 32}" for i in range(64)]
    apart = numbered(first, second)
    order = Order(np.full(64, 5), 8, seed=0, apart=apart)
    batches = [order.rows(step) for step in range(8)]
    assert sorted(np.concatenate(batches)) == list(range(64))
    assert all(len(set(apart[1][rows])) == 8 for rows in batches[:-1])  # what is left for the last may not fit
    plain = [np.random.default_rng(0).permutation(64)[step * 8 : step * 8 + 8] for step in range(8)]
    assert not all(len(set(apart[1][rows])) == 8 for rows in plain)
    same = Order(np.full(10, 5), 4, seed=0, apart=numbered(["q"] * 10, ["d"] * 10))
    assert len(set(np.concatenate([same.rows(0), same.rows(1)]))) == 8  # nothing fits: it ends, and loses nothing
    assert same.epoch_rows == 8


def test_metrics_against_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nogemm.train.task.metrics.RESAMPLES", 100)
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 5.0]])
    targets = np.array([0, 1, 1, 1])
    found = measured("classify", logits, targets)
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx(f1_score(targets, [0, 1, 0, 1], average="macro"))
    right = np.array([np.log1p(np.exp(-2)), np.log1p(np.exp(-1)), np.log1p(np.exp(3)), np.log1p(np.exp(-5))])
    assert found["validation_loss"] == pytest.approx(right.mean())
    numbers = measured("regress", np.array([1.0, 2.0, 4.0]), np.array([2.0, 4.0, 8.0]), spread=2.0)
    assert numbers["pearson"] == pytest.approx(1.0)
    assert numbers["validation_loss"] == pytest.approx((1 + 4 + 16) / 3 / 2)
    constant = measured("regress", np.ones(3), np.array([2.0, 4.0, 8.0]))
    assert constant["pearson"] == constant["spearman"] == 0.0
    assert measured("classify", logits[:, ::-1], targets)["accuracy"] == 0.25
    for task, names in METRICS.items():
        answers = np.array([1, 2, 30]) if task == "embed" else np.eye(3)[:, :2] if task != "regress" else np.arange(3.0)
        shown = figures(task, answers, np.array([0, 1, 1]))
        assert set(shown) == set(names)
        assert all(
            figure["interval"] and figure["low"] <= figure["value"] <= figure["high"] for figure in shown.values()
        )


def test_wilsons_interval_is_the_published_one() -> None:
    low, high = wilson(81, 263)  # Newcombe (1998), table I, method 3
    assert (low, high) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(10, 10)[1] == pytest.approx(1.0)
    assert wilson(10, 10)[0] < 0.8


def test_equal_documents_do_not_stand_in_each_others_way() -> None:
    queries = np.eye(3)
    documents = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0]])
    queries[1] = queries[0]
    assert document_ranks(queries, documents, np.array([0, 0, 2])).tolist() == [1, 1, 1]
    assert document_ranks(queries, documents, np.array([0, 1, 2])).tolist() == [2, 2, 1]


def glue(task: str) -> datasets.DatasetDict:
    """Make splits as GLUE's are: labels by number, those of the test rows not public."""
    label = datasets.ClassLabel(names=["negative", "positive"])
    text, text2 = GLUE[task]

    def split(count: int, hidden: bool) -> datasets.Dataset:
        found = rows(count, seed=count)
        columns: dict[str, Any] = {text: [row["text"] for row in found]}
        kind = datasets.Value("float32") if task == "stsb" else label
        features: dict[str, Any] = {text: datasets.Value("string"), "label": kind}
        if text2 is not None:
            columns[text2] = [row["text2"] for row in found]
            features[text2] = datasets.Value("string")
        columns["label"] = [-1 if hidden else int(row["label"] == "good") for row in found]
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    names = {"mnli": "validation_matched"}
    return datasets.DatasetDict(
        {"train": split(60, False), names.get(task, "validation"): split(20, False), "test": split(15, True)}
    )


@pytest.mark.parametrize(("task", "ours"), [("sst2", "classify"), ("mnli", "pairs"), ("stsb", "regress")])
def test_glue_by_name(task: str, ours: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*words: Any) -> datasets.DatasetDict:
        asked.append(words)
        return glue(task)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    report = tune(model, data=f"glue/{task}", task=ours, steps=2).report
    assert asked == [("nyu-mll/glue", task)]
    assert report.data["rows"] == {"train": 60, "validation": 20}
    assert report.data["labels"].keys() == (set() if ours == "regress" else {"negative", "positive"})
    assert report.test is None  # its labels are not public
    assert report.data["source"] == f"glue/{task}"


def test_a_hub_that_cannot_be_reached_is_one_clear_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = (
        r"glue/sst2: no such file, and the hub's data set nyu-mll/glue cannot be opened: offline.*give a JSONL or CSV"
    )
    with pytest.raises(nogemm.DataError, match=said):
        tune(model, data="glue/sst2")


def test_splits_that_were_opened_are_taken_as_they_are() -> None:
    found = read_data(SMALL, {"train": ROWS[:40], "validation": ROWS[40:50], "test": ROWS[50:55]})
    assert {part: len(rows) for part, rows in found.items()} == {"train": 40, "validation": 10, "test": 5}
    with pytest.raises(nogemm.DataError, match="no split to train on; it has dev"):
        read_data(SMALL, {"dev": ROWS})
