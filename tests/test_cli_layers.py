"""Words of the command line for sums."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModel

import nogemm
from nogemm.layers import SumFFN
from test_cli import run, tiny

__all__ = ["tiny"]  # a fixture


def test_a_sum_is_converted_and_distilled(tiny: Path, tmp_path: Path) -> None:
    words = [
        "--method",
        "dense+lookup",
        "--set",
        "dense.hidden=8",
        "--set",
        "lookup.tables=4",
        "--set",
        "lookup.bits=3",
    ]
    more = ["--set", "lookup.projection.block=8", "--data", tmp_path / "texts.jsonl"]
    assert run("convert", tiny, tmp_path / "out", *words, *more) == 0
    trained = tmp_path / "trained"
    budget = ["--tokens", 200, "--data", tmp_path / "texts.jsonl"]
    assert run("distil", tmp_path / "out", trained, "--teacher", tiny, *budget, "--optimizer", "lazy-adam") == 0
    layers = nogemm.converted(AutoModel.from_pretrained(trained))
    assert [type(layer) for layer in layers.values()] == [SumFFN, SumFFN]
    first = next(iter(layers.values())).config
    assert isinstance(first, nogemm.SumConfig)
    assert [term.kind for term in first.terms] == ["dense", "lookup"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "dense+lookup", "--set", "tables=4"], "say which of dense, lookup is meant"),
        (["--method", "sum"], "name its terms, such as dense+lookup"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", tiny, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
