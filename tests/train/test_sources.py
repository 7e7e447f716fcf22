"""Texts from every kind of source, and search pairs for evaluation."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from nogemm.train import DataError, load_split, texts

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_rows(path: Path, rows: list[object]) -> Path:
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content.encode()))
    else:
        path.write_text(content, encoding="utf-8")
    return path


def test_text_file_gives_one_text_a_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("first\n\n  second  \n", encoding="utf-8")
    assert list(texts(path)) == ["first", "second"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_jsonl_fields(tmp_path: Path, name: str) -> None:
    rows: list[object] = [{"text": "a", "body": "x"}, {"text": "b", "body": None}]
    path = write_rows(tmp_path / name, rows)
    assert list(texts(path)) == ["a", "b"]
    assert list(texts(path, field="body")) == ["x"]
    assert list(texts(path, field=("text", "body"))) == ["a", "x", "b"]


def test_short_and_long_are_two_texts_and_other_splits_are_left_out(tmp_path: Path) -> None:
    rows: list[object] = [
        {"split": "train", "short": "s1", "long": "l1"},
        {"split": "test", "short": "s2", "long": "l2"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert list(texts(path)) == ["s1", "l1"]
    assert list(texts(path, split=None)) == ["s1", "l1", "s2", "l2"]


def test_iterables_and_datasets() -> None:
    from datasets import Dataset, DatasetDict

    assert list(texts(iter(["a", "", "b"]))) == ["a", "b"]
    dataset = Dataset.from_dict({"text": ["c", "d"]})
    assert list(texts(dataset)) == ["c", "d"]
    assert list(texts(dataset.to_iterable_dataset())) == ["c", "d"]
    with pytest.raises(DataError, match="several splits"):
        list(texts(DatasetDict({"train": dataset})))


def test_sources_are_read_lazily() -> None:
    def endless():
        while True:
            yield "again"

    source = texts(endless())
    assert [next(source) for _ in range(3)] == ["again"] * 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"other": "a"}], "name the one"),
        ([{"text": 3}], "int, not text"),
        ([[1]], "neither a JSON object"),
    ],
)
def test_bad_rows_name_the_problem(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(texts(write_rows(tmp_path / "rows.jsonl", rows)))


def test_bad_files_name_the_problem(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such data file"):
        list(texts(tmp_path / "absent.txt"))
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text"\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 2 is not JSON"):
        list(texts(broken))
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        list(texts(binary))
    cut = write_rows(tmp_path / "cut.jsonl.gz", [{"text": "a" * 1000}])
    cut.write_bytes(cut.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        list(texts(cut))


def test_missing_field_is_named() -> None:
    with pytest.raises(DataError, match="no field 'body'"):
        list(texts([{"text": "a"}], field="body"))


def test_the_packaged_sample_has_three_disjoint_splits() -> None:
    splits = {name: load_split("sample", name) for name in ("train", "validation", "test")}
    assert len(splits["test"]) >= 1800
    assert len(splits["validation"]) >= 300
    assert len(splits["train"]) >= 10_000
    openings = {
        name: {re.sub(r"\d", "", document[:120].lower()) for document in pairs.documents}
        for name, pairs in splits.items()
    }
    assert not openings["test"] & openings["train"]
    assert not openings["test"] & openings["validation"]
    training = list(texts("sample"))
    assert len(training) == 2 * len(splits["train"])
    assert not set(splits["test"].documents) & set(training)


def test_packages_without_a_split_field_are_split_by_their_opening(tmp_path: Path) -> None:
    rows: list[object] = [
        {
            "name": f"p{i}",
            "section": "x",
            "short": f"short {i}",
            "long": f"Opening {LETTERS[i % 26]}{LETTERS[i // 26]} end",
        }
        for i in range(400)
    ]
    path = write_rows(tmp_path / "packages.jsonl", rows)
    sizes = {name: len(load_split(path, name)) for name in ("train", "validation", "test")}
    assert sum(sizes.values()) == 400
    assert sizes["train"] > 320
    assert min(sizes.values()) > 4


def test_glosses_are_evaluation_pairs(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "glosses.jsonl", [{"id": "n1", "words": ["one", "two"], "gloss": "a number"}])
    pairs = load_split(path)
    assert (pairs.queries, pairs.documents) == (["one, two"], ["a number"])


def test_load_split_refuses_what_it_cannot_pair(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown split"):
        load_split("sample", "dev")
    with pytest.raises(DataError, match="neither `short`"):
        load_split(write_rows(tmp_path / "rows.jsonl", [{"text": "a"}]))
    with pytest.raises(DataError, match="no rows in the split"):
        load_split(write_rows(tmp_path / "rows2.jsonl", [{"split": "train", "short": "a", "long": "b"}]))
