"""Text, JSONL and CSV files are read by one reader, whose errors name file, line and field."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nogemm.train import DataError, load_labels, load_split, text_pairs, texts
from nogemm.train.reader import read

MARK = b"\xef\xbb\xbf"
FILES = {
    "notes.txt": b"first\n\n  \nsecond one\n",
    "rows.jsonl": b'{"text": "first"}\n\n  \n{"text": "second one"}\n',
    "rows.csv": b'id,text\n1,first\n\n  \n2,"second one"\n',
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", [b"", MARK], ids=["bare", "marked"])
@pytest.mark.parametrize("name", FILES)
def test_marks_blank_lines_and_line_ends_leave_no_trace(
    tmp_path: Path, name: str, mark: bytes, end: bytes, packed: bool
) -> None:
    content = mark + FILES[name].replace(b"\n", end)
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert list(texts(path)) == ["first", "second one"]
    assert [row.number for row in read(path)] == [1, 4] if name != "rows.csv" else [2, 5]


def test_joined_files_leave_no_mark_inside(tmp_path: Path) -> None:
    path = tmp_path / "joined.jsonl"
    path.write_bytes(2 * (MARK + b'{"text": "one"}\n'))
    assert list(texts(path)) == ["one", "one"]


def test_quoted_fields_of_a_csv_file_keep_commas_quotes_and_newlines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = [["text", "split"], ['a, "quoted"\nline', "train"], ["b", "test"], ["x" * 200_000, ""], ["c", "train"]]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    assert list(texts(path)) == ['a, "quoted"\nline', "x" * 200_000, "c"]
    assert [row.number for row in read(path)] == [2, 4, 5, 6]


def test_a_csv_file_gives_search_pairs_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("short,long,text,label\nq,d,t,1\n", encoding="utf-8")
    pairs = load_split(path)
    assert (pairs.queries, pairs.documents) == (["q"], ["d"])
    assert [(row.text, row.class_of(2, {})) for row in load_labels(path)] == [("t", 1)]
    assert list(text_pairs(path, ("short", "long"))) == [("q", "d")]


def pairs_of(path: Path) -> Any:
    return list(text_pairs(path, ("query", "document")))


def texts_of(path: Path) -> Any:
    return list(texts(path))


def bodies_of(path: Path) -> Any:
    return list(texts(path, field="body"))


GOOD_LINE = b'{"text": "a", "label": 1, "short": "a", "long": "b", "query": "q", "document": "d"}\n'
BAD: dict[str, tuple[Callable[[Path], Any], str, bytes, str]] = {
    "bad JSON": (texts_of, "f.jsonl", GOOD_LINE + b'{"text"\n', r"line 2 is not JSON"),
    "not an object": (texts_of, "f.jsonl", GOOD_LINE + b"[1]\n", r"line 2 is neither a JSON object nor a string"),
    "not a string": (texts_of, "f.jsonl", GOOD_LINE + b'{"text": 3}\n', r"line 2, field 'text': int, not text"),
    "half a character": (texts_of, "f.jsonl", b'{"text": "\\ud83d"}\n', r"line 1, field 'text': half of a surrogate"),
    "no such field": (bodies_of, "f.jsonl", GOOD_LINE, r"line 1 has no field 'body'; it has: text, label"),
    "no such column": (
        bodies_of,
        "f.csv",
        b"text\na\n",
        r"line 2 has no field 'body'.*names its columns",
    ),
    "no text": (texts_of, "f.txt", b"\n\n", r"holds no text"),
    "no text in the split": (texts_of, "f.csv", b"text,split\na,test\n", r"holds no text of the split 'train', only 1"),
    "header alone": (texts_of, "f.csv", b"text\n", r"holds no text"),
    "a column twice": (texts_of, "f.csv", b"text,text\na,b\n", r"line 1, the header row, names 'text' more than once"),
    "a cell too many": (texts_of, "f.csv", b'text\n"a\nb"\n\nc,d\n', r"line 5 has 2 fields, the header row has 1"),
    "an open quote": (texts_of, "f.csv", b'text\na\n"b\nc\n', r"line 3 is not CSV .*is a quote missing"),
    "not UTF-8": (texts_of, "f.txt", b"a\n" * 20_000 + b"caf\xe9\n", r"line 20001 is not UTF-8"),
    "UTF-16": (texts_of, "f.csv", "text\na\n".encode("utf-16"), r"line 1 is not UTF-8"),
    "not gzipped": (texts_of, "f.txt.gz", b"text", r"cannot be read: Not a gzipped file"),
    "null query": (load_split, "f.jsonl", b'{"short": null, "long": "b"}\n', r"line 1, field 'short': null, not text"),
    "null gloss": (load_split, "f.jsonl", b'{"words": ["a"], "gloss": null}\n', r"line 1, field 'gloss': null"),
    "word is a number": (load_split, "f.jsonl", b'{"words": [1], "gloss": "b"}\n', r"field 'words': int, not text"),
    "null partner": (pairs_of, "f.jsonl", b'{"query": "q", "document": null}\n', r"line 1, field 'document': null"),
    "plain text": (pairs_of, "f.txt", b"a\n", r"line 1 is plain text: rows with named fields are needed"),
    "null label": (load_labels, "f.jsonl", b'{"text": "a", "label": null}\n', r"line 1, field 'label': null, neither"),
    "half a label": (load_labels, "f.jsonl", b'{"text": "a", "label": 1.5}\n', r"field 'label': 1.5, neither a whole"),
    "no label": (load_labels, "f.jsonl", b'{"text": "a"}\n', r"line 1 has no field 'label'"),
    "no labels": (load_labels, "f.jsonl", b"\n", r"has no rows in the split 'test'"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_file_line_and_field(tmp_path: Path, case: str) -> None:
    how, name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        how(path)
    assert str(path) in str(error.value)


def test_texts_without_a_value_are_left_out_as_empty_ones_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"title": null, "body": "b"}\n{"title": "", "body": "c"}\n', encoding="utf-8")
    assert list(texts(path, field=("title", "body"))) == ["b", "c"]


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(DataError, match="must be a file, 'sample' or an iterable of texts, got int"):
        list(texts(3))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row 2: expected a string or a mapping, got int"):
        list(texts(["a", 3]))
