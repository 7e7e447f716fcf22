"""Result files given to `nogemm report`: good results of every kind with values replaced, and raw bytes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import fuzz_results
from fuzz_target import Choices, Target, answer_or_error, bounded, edit_json, expect, folder

from nogemm.bench.report.write import write_report

RAW = 0


def run(data: bytes) -> None:
    """First byte 0: the rest is the file. Else: which result, then edits of it."""
    choices = Choices(data)
    results = fuzz_results.results()
    chosen = choices.below(len(results) + 1)
    if chosen == RAW:
        content = choices.rest()
    else:
        value: Any = results[chosen - 1]
        for _ in range(1 + choices.below(4)):
            value = edit_json(value, choices)
        content = json.dumps(value).encode("utf-8", "surrogatepass")
    with folder() as place:
        (place / "result.json").write_bytes(content)
        with bounded(len(content)):
            page = answer_or_error(lambda: write_report([place / "result.json"], place / "report.html"))
        if page is None:
            expect(not Path(place / "report.html").exists(), "an error, and yet a report")
        else:
            text = page.read_text()
            expect(text.rstrip().endswith("</html>") and "<script" not in text, "no page, or one with a script in it")


@functools.cache
def seeds() -> list[bytes]:
    """An edit of every result, and a raw one."""
    whole = json.dumps(fuzz_results.results()[0]).encode()
    return [bytes([RAW]) + whole, *(bytes([i + 1, 0, 9, 0, 7, 5]) for i in range(len(fuzz_results.results())))]


TARGET = Target("reports", run, seeds, ["kind", "rows", "settings", "NaN", "1e999", '"', "{", "[["], longest=8192)
