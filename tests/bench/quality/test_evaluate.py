"""`eval --task classify` reads labels by the one reader and checks them against the model's classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nogemm.bench.quality.evaluate import EvalArgs, run_eval
from nogemm.errors import ConfigError
from nogemm.models.directory import PACKAGED
from nogemm.models.loading import load_tokenizer
from nogemm.train import DataError


def save_classifier(directory: Path, classes: int) -> str:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(classes)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config.num_labels = classes
    model = BertForSequenceClassification(config)
    model.save_pretrained(directory)
    load_tokenizer(PACKAGED).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifier"), 3)


def accuracy(model: str, path: Path, content: str) -> float:
    path.write_text(content, encoding="utf-8")
    return run_eval(EvalArgs(model=model, task="classify", data=str(path)))["ours"]["accuracy"]["value"]


def test_equal_rows_score_equally_in_every_form(model: str, tmp_path: Path) -> None:
    rows = [("a text", 0), ("another one", 1), ("a third", 2)]
    jsonl = "".join(f'{{"text": "{text}", "label": {label}}}\n' for text, label in rows)
    expected = accuracy(model, tmp_path / "plain.jsonl", jsonl)
    assert accuracy(model, tmp_path / "blank.jsonl", "\ufeff" + jsonl + "\n\n") == expected
    named = "".join(f"{text},LABEL_{label}\n" for text, label in rows)
    assert accuracy(model, tmp_path / "named.csv", "text,label\r\n" + named) == expected
    numbers = "".join(f"{text},{label}\n" for text, label in rows)
    assert accuracy(model, tmp_path / "numbers.csv", "text,label\n" + numbers) == expected


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("3", r"line 2, field 'label': label 3 is not one of the model's 3: 0 to 2, or by name LABEL_0, LABEL_1"),
        ("-1", "line 2, field 'label': label -1 is not one"),
        ('"joy"', "line 2, field 'label': label 'joy' is not one"),
        ("true", "line 2, field 'label': True, neither a whole number nor a name"),
    ],
)
def test_labels_are_checked_against_the_classes(model: str, tmp_path: Path, label: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    content = f'{{"text": "a", "label": 0}}\n{{"text": "b", "label": {label}}}\n'
    with pytest.raises(DataError, match=message) as error:
        accuracy(model, path, content)
    assert str(path) in str(error.value)


def test_a_model_with_one_logit_has_no_classes(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "model", 1)
    with pytest.raises(ConfigError, match="two classes or more; BertForSequenceClassification has 1"):
        accuracy(model, tmp_path / "rows.jsonl", '{"text": "a", "label": 0}\n')
