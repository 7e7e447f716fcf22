"""Data files: texts, search pairs, labelled rows, from text, JSONL and CSV, plain and gzipped."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from typing import Any

from fuzz_target import Target, answer_or_error, bounded, expect, folder

from nogemm.train.sources import load_labels, load_split, text_pairs, texts

SUFFIXES = (".txt", ".jsonl", ".csv", ".txt.gz", ".jsonl.gz", ".csv.gz")


def run(data: bytes) -> None:
    """First byte: the file's ending; second: whether what follows is packed for a gzipped one, or packed already."""
    suffix, content = SUFFIXES[data[0] % len(SUFFIXES)] if data else ".txt", data[2:]
    if suffix.endswith(".gz") and data[1:2] != b"z":
        content = gzip.compress(content, 1)
    with folder() as place:
        file = place / f"data{suffix}"
        file.write_bytes(content)
        readers: list[Callable[[], Any]] = [
            lambda: list(texts(file, split=None)),
            lambda: list(texts(file, field="a")),
            lambda: list(text_pairs(file, ("a", "b"))),
            lambda: load_split(file, "test"),
            lambda: load_labels(file),
        ]
        with bounded(max(len(content), len(data))):
            found = [answer_or_error(read) for read in readers]
        for text in found[0] or ():
            expect(isinstance(text, str) and text.strip() == text != "", f"{text!r} is no text")
            text.encode()
        if suffix == ".txt" and found[0] is not None:
            lines = content.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
            right = [line.lstrip("\ufeff").strip() for line in lines]
            expect(found[0] == [line for line in right if line], "other texts than the file has")


def seeds() -> list[bytes]:
    """A good file of every form."""
    rows = b'{"text": "one", "a": "x", "b": "y", "split": "test"}\n"two"\n{"query": "q", "document": "d", "label": 1}\n'
    table = b'text,a,b,label\n"one, two",x,y,0\r\nthree,"x\ny",z,name\n'
    debian = b'{"name": "n", "section": "s", "short": "a b", "long": "c d e"}\n'
    plain = "one\r\n\n  two \r\ufeffthree".encode()
    found = [b"\0-" + plain, b"\1-" + rows, b"\1-" + debian, b"\2-" + table]
    return [*found, b"\3-" + plain, b"\4-" + rows, b"\5-" + table, b"\4z" + gzip.compress(rows)]


WORDS = [
    "text",
    "short",
    "long",
    "query",
    "document",
    "label",
    "split",
    "test",
    "\\ud800",
    '{"',
    '""',
    "\ufeff",
    "null",
]
TARGET = Target("data", run, seeds, WORDS)
