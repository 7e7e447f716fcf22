"""No option is read and then left out of what happens: those that do not apply are refused, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import nogemm
import people
from nogemm.convert.head import find_head


def failed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a command that must end in code 2 and an error, behind lines of progress at most; return its line."""
    capsys.readouterr()
    assert people.run(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("nogemm: ")
    assert "Traceback" not in err
    return line


EXPORT = ("export", "model", "out")
DECODER = (*EXPORT, "--generate")
GENERATE = ("generate", "model", "--prompt", "a")
CONVERT = ("convert", "model", "out")
STEP = ("bench", "train-step")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        *(((*EXPORT, f"--{name}", "float"), f"--{name} needs --generate") for name in ("body", "rows", "head", "mode")),
        ((*DECODER, "--int8"), "--int8 does not go with --generate: the precision of a decoder's matrices is --body"),
        ((*DECODER, "--rest", "int8"), "--rest does not go with --generate"),
        ((*DECODER, "--head", "dense", "--data", "sample"), "--data does not go with --head dense"),
        ((*DECODER, "--head", "some"), "--head must be exact or dense, got 'some'"),
        ((*GENERATE, "--temperature", "2"), "--temperature needs --sample"),
        ((*GENERATE, "--temperature", "1.0"), "--temperature needs --sample"),
        ((*GENERATE, "--top-k", "2"), "--top-k needs --sample"),
        ((*GENERATE, "--top-p", "0.5"), "--top-p needs --sample"),
        ((*GENERATE, "--seed", "1"), "--seed needs --sample"),
        ((*GENERATE, "--mode", "quick"), "--mode must be one of exact, deferred, high_recall, fast, got 'quick'"),
        ((*CONVERT, "--head-data", "sample"), "--head-data needs --head"),
        ((*CONVERT, "--head", "quick"), "--head must be one of exact, deferred, high_recall, fast, got 'quick'"),
        (
            (*CONVERT, "--head", "exact", "--set", "tables=4"),
            "--set needs --method: --head alone leaves",
        ),
        ((*CONVERT, "--head", "exact", "--layers", "0"), "--layers needs --method"),
        ((*CONVERT, "--head", "exact", "--data", "sample"), "--data needs --method"),
        ((*CONVERT, "--head", "exact", "--tables", "int8"), "--tables needs --method"),
        ((*CONVERT, "--head", "exact", "--faster-at", "1"), "--faster-at needs --method"),
        ((*CONVERT, "--head", "exact", "--speed", "int8"), "--speed needs --method"),
        (("bench", "layer", "--site", "1"), "--site needs --checkpoint: a layer that is built has no site"),
        (("bench", "layer", "--checkpoint", "m", "--set", "tables=4"), "--set does not go with --checkpoint"),
        (("bench", "layer", "--checkpoint", "m", "--method", "tree"), "--method does not go with --checkpoint"),
        (("bench", "model", "--model", "m", "--method", "tree"), "--method does not go with --model"),
        (("bench", "model", "--model", "m", "--set", "tables=4"), "--set does not go with --model"),
        ((*STEP, "--site", "1"), "--site needs --checkpoint"),
        ((*STEP, "--checkpoint", "m", "--codes", "skewed"), "--codes does not go with --checkpoint"),
        (("profile", "--site", "1"), "--site needs --checkpoint"),
        (("profile", "--checkpoint", "m", "--method", "tree"), "--method does not go with --checkpoint"),
        (("train", "out", "--tokenizer", "t", "--vocabulary", "300"), "--vocabulary does not go with --tokenizer"),
        (
            ("train", "out", "--model", "m", "--vocabulary", "300"),
            "--vocabulary does not go with --model, a",
        ),
        (("env", "--processor", "--json", "out.json"), "--json does not go with --processor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_option_that_does_not_apply_is_refused(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in failed(capsys, *words)


def test_options_that_apply_are_not_refused(capsys: pytest.CaptureFixture[str]) -> None:
    # The commands go on to the model, which is not there: the refusals above say more than "no".
    for words in (
        (*EXPORT, "--rest", "int8", "--dtype", "int8", "--data", "sample"),
        (*DECODER, "--head", "exact", "--mode", "deferred", "--body", "int4", "--rows", "bf16"),
        (*GENERATE, "--sample", "--temperature", "2", "--seed", "1", "--top-k", "3"),
        (*CONVERT, "--head", "exact", "--head-data", "sample", "--method", "dense", "--layers", "0"),
    ):
        assert "model" in failed(capsys, *words)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people.gpt2(tmp_path_factory.mktemp("options") / "gpt2")


@pytest.fixture(scope="module")
def converted(gpt2: Path) -> Path:
    assert people.run("convert", gpt2, gpt2.with_name("converted"), "--head", "fast") == 0
    return gpt2.with_name("converted")


def test_convert_stores_a_head_alone(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    (tmp_path / "texts.txt").write_text("\n".join(people.TEXTS))
    words = ("--head", "deferred", "--head-data", tmp_path / "texts.txt")
    assert people.run("convert", gpt2, out, *words, "--json", report) == 0
    said = capsys.readouterr().out
    assert "mode deferred" in said
    assert "shared with the embedding" in said
    model: Any = tf.AutoModelForCausalLM.from_pretrained(out)
    head = find_head(model)
    assert head is not None
    assert head.config.mode == "deferred"
    assert head.moment is not None
    assert head.moment.abs().sum() > 0
    assert not nogemm.converted(model)
    assert json.loads(report.read_text())["head"] == nogemm.head_report(model).to_dict()
    capsys.readouterr()
    assert people.run("info", out, "--json", report) == 0
    said = capsys.readouterr().out
    assert "GPT2LMHeadModel" in said
    assert "transformer.h.1" in said
    assert said.count("not converted") == 2
    assert "head 9 x 16, mode deferred" in said
    result = json.loads(report.read_text())
    assert result["head"]["codes_bytes"] == head.codes().bytes
    assert people.run("info", gpt2) == 0
    assert "vocabulary head: not converted, or none" in capsys.readouterr().out


def test_convert_stores_a_head_beside_ffns(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = ("--method", "dense", "--set", "hidden=32", "--set", "activation=gelu_new")
    assert people.run("convert", gpt2, tmp_path / "out", *same, "--head", "exact", "--json", tmp_path / "c.json") == 0
    report = json.loads((tmp_path / "c.json").read_text())
    assert len(report["sites"]) == 2
    assert report["head"]["mode"] == "exact"
    model: Any = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert len(nogemm.converted(model)) == 2
    assert find_head(model) is not None
    dense: Any = tf.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-4)
    capsys.readouterr()
    assert people.run("info", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("  dense  ") == 2


def test_an_encoder_without_a_head_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bert = people.bert(tmp_path / "bert")
    assert "has no vocabulary head" in failed(capsys, "convert", bert, tmp_path / "out", "--head", "exact")
    assert not (tmp_path / "out").exists()


def test_generate_uses_the_stored_mode_or_the_one_asked_for(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", converted, "--prompt", "a fast", "--max-new-tokens", 5, "--json", tmp_path / "g.json")
    for more, mode, searched, proven in (
        ((), "fast", True, False),
        (("--mode", "exact"), "exact", False, True),
        (("--mode", "deferred"), "deferred", True, True),
    ):
        assert people.run(*words, *more) == 0
        result = json.loads((tmp_path / "g.json").read_text())
        assert result["mode"] == mode
        assert (result["search_rows"] is not None) == searched
        assert (result["proof_rows"] is not None) == proven
        assert all(result[name] is None or result[name] <= 9 for name in ("search_rows", "proof_rows"))
    said = failed(capsys, *words, "--mode", "high_recall")
    assert "--mode high_recall: the rows of that mode are chosen when a head is converted" in said
    assert "--data: the head" in failed(capsys, *words, "--data", "sample")


def test_export_takes_what_the_model_has(
    gpt2: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    said = failed(capsys, "export", gpt2, out, "--generate", "--dtype", "int8")
    assert "--dtype is of converted FFNs, and the model has none" in said
    said = failed(capsys, "export", converted, out, "--generate", "--data", "sample")
    assert "--data is what a dense head's codes are fitted to" in said
    assert "--head dense: the model's head is converted" in failed(
        capsys, "export", converted, out, "--generate", "--head", "dense"
    )
    same = ("--method", "dense", "--set", "hidden=32", "--set", "activation=gelu_new")
    assert people.run("convert", gpt2, tmp_path / "ffns", *same) == 0
    seen: list[dict[str, Any]] = []

    def export_decoder(model: Any, path: Path, **choices: Any) -> None:
        seen.append(choices)
        raise nogemm.ConfigError("far enough")

    monkeypatch.setattr(nogemm, "export_decoder", export_decoder)
    for more, dtype in (((), "int8"), (("--dtype", "bf16"), "bf16")):
        assert "far enough" in failed(capsys, "export", tmp_path / "ffns", out, "--generate", *more)
        assert seen[-1]["dtype"] == dtype
