"""Pooled embeddings, masked losses and labels on a tiny encoder, against the formulas written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nogemm.bench.quality.evaluate import EvalArgs, correct, evaluate, run_eval
from nogemm.errors import ConfigError
from nogemm.models.directory import PACKAGED
from nogemm.models.embed import embed, logits, masked_losses
from nogemm.models.loading import load_tokenizer
from nogemm.train.errors import DataError

TEXTS = [
    "a text",
    "another and much longer text about the cost of reading rows from tables",
    "short",
    "words that are neither short nor long",
    "",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(PACKAGED)


def tiny(cls: str = "BertModel", seed: int = 0) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.num_labels = 3
    return getattr(transformers, cls)(config).eval()


def test_embedding_is_the_masked_mean_of_length_one(tokenizer: Any) -> None:
    model = tiny()
    found = embed(model, tokenizer, TEXTS)
    assert found.dtype == np.float32
    for row, text in zip(found, TEXTS, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(0)
        assert row == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_batches_do_not_change_embeddings(tokenizer: Any) -> None:
    model = tiny()
    one_by_one = embed(model, tokenizer, TEXTS, batch_tokens=1)
    assert embed(model, tokenizer, TEXTS, batch_tokens=10_000) == pytest.approx(one_by_one, abs=1e-5)


def test_long_texts_are_cut(tokenizer: Any) -> None:
    model = tiny()
    head = " ".join(TEXTS[1].split()[:4])
    assert embed(model, tokenizer, [TEXTS[1]], max_length=6) == pytest.approx(embed(model, tokenizer, [head]), abs=1e-5)


def test_mode_is_put_back_and_progress_told(tokenizer: Any) -> None:
    model = tiny().train()
    told: list[tuple[int, int]] = []
    embed(model, tokenizer, TEXTS, batch_tokens=20, progress=lambda done, total: told.append((done, total)))
    assert model.training
    assert told[-1] == (5, 5)
    assert len(told) > 1


def test_no_text_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="no text"):
        embed(tiny(), tokenizer, [])


def test_masked_loss_of_a_uniform_model_is_log_vocabulary(tokenizer: Any) -> None:
    model = tiny("BertForMaskedLM")
    with torch.no_grad():
        for parameter in model.get_submodule("cls").parameters():
            parameter.zero_()
    sums, counts = masked_losses(model, tokenizer, TEXTS)
    assert sums.sum() / counts.sum() == pytest.approx(np.log(30522), rel=1e-5)
    # The empty text has no ordinary token and drops out; every other has at least one hole.
    assert len(counts) == 4
    assert counts.min() >= 1


def test_masks_depend_on_seed_and_text_alone(tokenizer: Any) -> None:
    model = tiny("BertForMaskedLM")
    sums, counts = masked_losses(model, tokenizer, TEXTS, seed=1, batch_tokens=1)
    again, again_counts = masked_losses(model, tokenizer, TEXTS, seed=1, batch_tokens=10_000)
    assert again == pytest.approx(sums, rel=1e-4)
    assert (again_counts == counts).all()
    assert masked_losses(model, tokenizer, TEXTS, seed=2)[0] != pytest.approx(sums, rel=1e-4)


def test_correct_counts_ties_against() -> None:
    scores = np.array([[1.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    assert correct(scores, [1, 0, 0]).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="1 of 3 rows of logits are not finite"):
        correct(np.where(scores == 3.0, np.nan, scores), [1, 0, 0])


def test_logits_come_in_order(tokenizer: Any) -> None:
    model = tiny("BertForSequenceClassification")
    found = logits(model, tokenizer, TEXTS)
    with torch.no_grad():
        alone = model(**tokenizer(TEXTS[2], return_tensors="pt")).logits[0]
    assert found.shape == (5, 3)
    assert found[2] == pytest.approx(alone.numpy(), abs=1e-5)


def test_a_model_agrees_with_itself_and_not_with_another(tokenizer: Any) -> None:
    pairs = [(f"query number {i} of {'tables' * (i % 5)}", f"document number {i}") for i in range(30)]
    model = tiny()
    same = evaluate(model, model, pairs, tokenizer=tokenizer)
    assert same["ours"]["agreement"]["value"] == pytest.approx(1.0)
    assert same["kept"]["mrr_at_10"]["value"] == 1.0
    assert same["ours"]["agreement"]["samples"] == 60
    other = evaluate(tiny(seed=1), model, pairs, tokenizer=tokenizer)
    assert other["ours"]["agreement"]["value"] < 0.9
    broken = tiny()
    with torch.no_grad():
        broken.get_submodule("encoder.layer.0.output.LayerNorm").bias.fill_(torch.nan)  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="not finite"):
        evaluate(broken, model, pairs, tokenizer=tokenizer)


@pytest.mark.parametrize("task", ["mlm", "classify"])
def test_tasks_from_directories(tmp_path: Path, tokenizer: Any, task: str) -> None:
    cls = {"mlm": "BertForMaskedLM", "classify": "BertForSequenceClassification"}[task]
    for seed, name in enumerate(("teacher", "ours")):
        tiny(cls, seed).save_pretrained(tmp_path / name)  # type: ignore[operator]
        tokenizer.save_pretrained(tmp_path / name)
    data = tmp_path / "data.jsonl"
    labels = [0, "LABEL_1", 2, 0]
    rows = [f'{{"text": "{text}", "label": {label!r}}}' for text, label in zip(TEXTS[:4], labels, strict=True)]
    data.write_text("\n".join(rows).replace("'", '"') + "\n")
    args = EvalArgs(model=str(tmp_path / "ours"), teacher=str(tmp_path / "teacher"), task=task, data=str(data))
    found = run_eval(args)
    figure = {"mlm": "mlm_loss", "classify": "accuracy"}[task]
    assert found["samples"] == 4
    ours, teacher = found["ours"][figure]["value"], found["teacher"][figure]["value"]
    assert found["difference"][figure]["value"] == pytest.approx(ours - teacher)
    assert found["ours"][figure]["low"] <= ours <= found["ours"][figure]["high"]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--task must be one of search, mlm, classify"):
        run_eval(EvalArgs(model="m", task="translate"))
    with pytest.raises(ConfigError, match="give --teacher"):
        run_eval(EvalArgs(model="m"))
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        run_eval(EvalArgs(model=str(tmp_path), teacher=str(tmp_path)))
    with pytest.raises(DataError, match="no such data file: nowhere"):
        run_eval(EvalArgs(model="m", task="classify", data="nowhere"))
    with pytest.raises(DataError, match="the packaged sample has no labels"):
        run_eval(EvalArgs(model="m", task="classify"))
