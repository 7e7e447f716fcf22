"""Words of the command line: choices, sums, token tables, models of fewer layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import nogemm
from nogemm.cli.models import parse_choice
from nogemm.errors import ConfigError
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


def test_layers_left_out_and_tables_beside_the_others(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--keep", "1", "--method", "dense+token_table", "--set", "token_table.start=zero"]
    assert run("convert", tiny, tmp_path / "out", *words) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("hidden_map="))
    assert said.startswith("hidden_map=[2] ")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    budget = ["--tokens", 200, "--data", tmp_path / "texts.jsonl", "--optimizer", "lazy-adam"]
    map_of = ["--set", said.split()[0]]
    assert run("distil", tmp_path / "out", tmp_path / "trained", "--teacher", tiny, *budget, *map_of) == 0
    model = AutoModel.from_pretrained(tmp_path / "trained")
    ids = torch.tensor([[2, 5, 3]])
    (layer,) = nogemm.converted(model).values()
    before = model(input_ids=ids).last_hidden_state
    with torch.no_grad():
        layer.get_parameter("terms.1.rows")[5] += 1.0
    assert not torch.allclose(model(input_ids=ids).last_hidden_state, before)
    assert (
        run("eval", tmp_path / "trained", "--teacher", tiny, "--data", tmp_path / "texts.jsonl", "--pack", "int8") == 0
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "dense+lookup", "--set", "tables=4"], "say which of dense, lookup is meant"),
        (["--method", "sum"], "name its terms, such as dense+lookup"),
        (["--keep", "0,7"], "keep_layers: numbers from 0 to 1 in rising order, got [0, 7]"),
        (["--keep", "a"], "--keep: expected whole numbers"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], said: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", tiny, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_choices_are_read_as_json_or_words() -> None:
    assert parse_choice("tokens=5") == ("tokens", 5)
    assert parse_choice("output=logits") == ("output", "logits")
    with pytest.raises(ConfigError, match="NAME=VALUE"):
        parse_choice("=5")
