"""`nogemm generate` on a small decoder: text, figures, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import nogemm
import people
from nogemm.cli import generate as command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people.gpt2(tmp_path_factory.mktemp("generate") / "gpt2")


def test_it_prints_the_dense_models_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(model)
    dense: Any = tf.GPT2LMHeadModel.from_pretrained(model).eval()
    ids = tokenizer("a fast", return_tensors="pt").input_ids
    expected = tokenizer.decode(dense.generate(ids, max_new_tokens=9, do_sample=False)[0, 2:], skip_special_tokens=True)
    words = ("generate", model, "--prompt", "a fast", "--max-new-tokens", 9)
    assert people.run(*words, "--json", tmp_path / "out.json") == 0
    out, err = capsys.readouterr()
    assert out.strip() == expected.strip()
    assert "9 of 9 rows of the head computed by a search; " in err
    assert "of 9 rows of the head computed by the proof of a token; 0 of 1 proofs found another token" in err
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["search_rows"] == 9
    assert 1 <= result["proof_rows"] <= 9
    assert not result.get("partial")
    assert result["text"].strip() == expected.strip()
    converted = tf.GPT2LMHeadModel.from_pretrained(model)
    nogemm.convert_head(converted, data=["a fast table"], tokenizer=tokenizer)
    nogemm.save(converted, tmp_path / "converted", tokenizer=tokenizer)
    assert people.run("generate", tmp_path / "converted", "--prompt", "a fast", "--max-new-tokens", 9) == 0
    assert capsys.readouterr().out.strip() == expected.strip()
    assert people.run(*words, "--sample", "--seed", 1) == 0
    first = capsys.readouterr().out
    assert people.run(*words, "--sample", "--seed", 1, "--dtype", "fp32") == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "a", "--chat"), "no chat template"),
        (("--prompt", "a", "--dtype", "int2"), "--dtype must be fp32 or bf16, got 'int2'"),
        (("--prompt", "a", "--max-new-tokens", "99"), "more than the model's 40 positions"),
        (("--prompt", "a", "--sample", "--top-p", "2"), "top_p must be above 0 and at most 1, got 2"),
    ],
)
def test_bad_input_is_one_line(
    model: Path, more: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert people.run("generate", model, *more) == 2
    assert said in capsys.readouterr().err


def test_ctrl_c_leaves_what_was_done(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("generate", model, "--prompt", "a fast", "--max-new-tokens", 9, "--json", tmp_path / "out.json")
    assert people.run(*words) == 0
    whole = json.loads((tmp_path / "out.json").read_text())["text"]
    add = command._Text.add

    def interrupted(self: Any, token: Any) -> None:
        add(self, token)
        if len(self.tokens) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(command._Text, "add", interrupted)
    capsys.readouterr()
    assert people.run(*words) == 130
    out, err = capsys.readouterr()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["partial"]
    assert "stopped by Ctrl-C" in result["reason"]
    assert result["tokens"] == 3
    assert whole.startswith(result["text"])
    assert 0 < len(result["text"]) < len(whole)
    assert out.strip() == result["text"].strip()
    assert "3 tokens, " in err
    assert "nogemm: stopped by Ctrl-C" in err


def test_an_error_leaves_what_was_done(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add = command._Text.add

    def failing(self: Any, token: Any) -> None:
        add(self, token)
        if len(self.tokens) == 2:
            raise nogemm.NotFiniteError("the state of sequence 0 before token 4 is not finite")

    monkeypatch.setattr(command._Text, "add", failing)
    file = tmp_path / "out.json"
    assert people.run("generate", model, "--prompt", "a fast", "--max-new-tokens", 9, "--json", file) == 2
    assert "before token 4 is not finite" in capsys.readouterr().err
    result = json.loads(file.read_text())
    assert result["partial"]
    assert result["tokens"] == 2


def test_an_encoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert people.run("generate", people.bert(tmp_path / "bert"), "--prompt", "a") == 2
    assert "has no vocabulary head" in capsys.readouterr().err
