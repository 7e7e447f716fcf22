"""Training of language models: it learns, it resumes bit by bit, and every way of stopping is clean."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import LOOKUP, TEXTS, TINY, log, stop_after, train
from tiny_training import make_texts
from transformers import AutoModelForMaskedLM, AutoTokenizer

import nogemm
from nogemm.layers._auxiliary import attach_loss
from nogemm.testing.cases import KINDS
from nogemm.train import checkpoint as ckpt
from nogemm.train.lm import trainer as trainer_module
from nogemm.train.lm.run import Run

TREE = nogemm.TreeConfig(trees=2, depth=3, balance="loss", routing="anneal")


@pytest.mark.parametrize(("task", "arch"), [("mlm", "roberta"), ("clm", "llama"), ("clm", "gpt2")])
def test_the_loss_falls(task: str, arch: str) -> None:
    found = train(task=task, arch=arch, ffn=LOOKUP, steps=40, warmup=0.1, lr=2e-2, dropout=0.0)
    report = found.report
    assert report.validation_loss < math.log(len(found.tokenizer)) - 0.5
    assert report.perplexity == pytest.approx(math.exp(report.validation_loss))
    assert not found.model.training
    assert all(p.requires_grad and p.grad is None for p in found.model.parameters())


def test_the_result_loads_as_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    found = train(ffn=LOOKUP)
    nogemm.save(found.model, tmp_path / "model", tokenizer=found.tokenizer)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    text = AutoTokenizer.from_pretrained(tmp_path / "model")(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.eval()(input_ids=text.input_ids).logits, found.model(input_ids=text.input_ids).logits
        )
    own = ("layers", "width", "heads", "dropout", "vocabulary")
    rest = {name: value for name, value in TINY.items() if name not in own}
    again = nogemm.train_model(TEXTS, model=tmp_path / "model", device="cpu", bar=False, steps=1, **rest)
    assert again.report.model["from"] == "checkpoint"
    assert again.report.model["ffn"] == found.report.model["ffn"]
    with pytest.raises(nogemm.ConfigError, match="width describe a new model"):
        nogemm.train_model(TEXTS, model=tmp_path / "model", steps=1, width=8)


def same_when_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[Any, Any]:
    """Return the logs of a whole run, and of one that was stopped after two steps and resumed."""
    whole, parts = folder / "whole", folder / "parts"
    train(whole, **changes)
    stop_after(1, parts, monkeypatch, **changes)
    assert [row["step"] for row in log(parts)] == [1, 2]
    train(parts, resume=True, **changes)
    return log(whole), log(parts)


@pytest.mark.parametrize("changes", [
    {"ffn": LOOKUP, "log_steps": 3, "validate_steps": 2},
    {"ffn": TREE, "optimizer": "lazy-adam", "micro_batch": 2},
], ids=["lookup", "tree"])  # fmt: skip
def test_a_stopped_run_ends_with_the_same_losses(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**changes, "log_steps": 1}
    whole, parts = same_when_stopped(tmp_path, monkeypatch, **options)
    assert whole == parts  # bit by bit
    assert whole[-1]["validation_loss"] is not None
    train(tmp_path / "other", **options, seed=1)
    assert log(tmp_path / "other") != whole


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_resumes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = same_when_stopped(tmp_path, monkeypatch, ffn=KINDS[kind], refit_steps=1)
    assert whole == parts


def test_a_resumed_run_needs_its_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "whole")
    stop_after(1, tmp_path / "parts", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "take_optimiser", lambda run: None)
        train(tmp_path / "parts", resume=True)
    assert log(tmp_path / "parts")[:2] == log(tmp_path / "whole")[:2]
    assert log(tmp_path / "parts")[3] != log(tmp_path / "whole")[3]


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainer_module.guessed_loss

    def attached(model: Any, inner: Any, ids: Any, labels: Any) -> tuple[Any, int]:
        total, count = plain(model, inner, ids, labels)
        return attach_loss(total, 3.0 * inner.get_input_embeddings().weight.square().sum()), count

    norms = {}
    for name, loss in (("plain", plain), ("attached", attached)):
        monkeypatch.setattr(trainer_module, "guessed_loss", loss)
        for micro in (4, 1):
            train(tmp_path / f"{name}{micro}", micro_batch=micro, dropout=0.0, steps=2)
            norms[name, micro] = [row["gradient_norm"] for row in log(tmp_path / f"{name}{micro}")[:2]]
    assert norms["plain", 1] == pytest.approx(norms["plain", 4], rel=1e-4)
    assert norms["attached", 1] == pytest.approx(norms["attached", 4], rel=1e-4)  # not four times the attached loss
    assert norms["attached", 4][0] > 1.5 * norms["plain", 4][0]


def test_a_finished_run_gives_its_report_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tmp_path, ffn=LOOKUP)
    monkeypatch.setattr(trainer_module.LanguageTrainer, "training_step", None)  # nothing is trained
    again = train(tmp_path, ffn=LOOKUP, resume=True)
    assert again.report == first.report
    assert all(a.equal(b) for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "whole", ffn=LOOKUP)
    plain = trainer_module.guessed_loss
    calls: list[int] = []

    def broken(*args: Any) -> tuple[torch.Tensor, int]:
        calls.append(1)
        total, count = plain(*args)
        return total * (math.nan if len(calls) == 3 else 1.0), count

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "guessed_loss", broken)
        with pytest.raises(nogemm.TrainingError, match=r"nan at step 3; gradients .*tables.*backbone.*step-00000002"):
            train(tmp_path / "parts", ffn=LOOKUP, checkpoint_steps=1)
    train(tmp_path / "parts", ffn=LOOKUP, resume=True)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_the_group_that_blew_up_is_named() -> None:
    with pytest.raises(nogemm.TrainingError, match="weights that are not finite: tables"):
        train(ffn=LOOKUP, lr_tables=1e39, clip=0.0, warmup=0.0, steps=3)


def test_a_full_disk_is_an_error_that_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = ckpt.save_file

    def full(tensors: Any, path: Path) -> None:
        if "step-00000002" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save_file", full)
        with pytest.raises(nogemm.TrainingError, match=r"step 2 .*No space.*step-00000001"):
            train(tmp_path, checkpoint_steps=1)
    assert train(tmp_path, resume=True).report.steps == 4


def test_two_runs_in_one_directory_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(nogemm.TrainingError, match="another run is writing"):
            train(tmp_path)
    train(tmp_path, steps=1)
    with pytest.raises(nogemm.TrainingError, match="holds an earlier run"):
        train(tmp_path, steps=1)


def test_a_resumed_run_wants_its_options_and_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(1, tmp_path, monkeypatch)
    with pytest.raises(nogemm.TrainingError, match=r"other options: steps: 4, now 9"):
        train(tmp_path, resume=True, steps=9)
    with pytest.raises(nogemm.TrainingError, match=r"ffn: None, now .*lookup"):
        train(tmp_path, resume=True, ffn=LOOKUP)
    with pytest.raises(nogemm.DataError, match=r"has changed|other data"):
        train(tmp_path, data=make_texts(150, seed=3), resume=True)
    assert train(tmp_path, resume=True, log_steps=2).report.steps == 4


def test_time_is_a_budget_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "seconds", lambda run: 10.0 * run.step)
    report = train(tmp_path, steps=None, max_seconds=35.0).report
    assert report.steps == 5  # the first step that begins after the budget's end is the last
    rates = [row["rate"] for row in log(tmp_path)[:-1]]
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_the_log_is_json_and_csv(tmp_path: Path) -> None:
    train(tmp_path, log_steps=2, validate_steps=3)
    rows = log(tmp_path)
    assert [row["step"] for row in rows] == [2, 3, 4]
    assert [row["validation_loss"] is not None for row in rows] == [False, True, True]
    with open(tmp_path / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in rows]


def test_the_report_says_what_was_done_and_where_nothing_of_the_machine(tmp_path: Path) -> None:
    data = tmp_path / "texts.txt"
    data.write_text("\n".join(TEXTS))
    report = train(tmp_path / "run", data=data, ffn=LOOKUP).report.to_dict()
    assert json.loads(json.dumps(report)) == report
    assert str(tmp_path) not in json.dumps(report)
    assert report["tokens"] == 4 * 4 * 16
    assert report["data"]["source"] == "texts.txt"
    assert report["parameters"]["ffn"] == sum(p.numel() for p in LOOKUP.build(16).parameters())
    assert report["flops_per_token"]["ffn"] == LOOKUP.build(16).cost(1).flops
    assert report["options"]["ffn"] == LOOKUP.to_dict()
    assert {"torch", "transformers", "accelerate", "nogemm"} <= set(report["machine"]["versions"])


def test_what_is_frozen_stays_as_it_is() -> None:
    model: Any = train(ffn=LOOKUP, steps=1).model
    layer: Any = next(iter(nogemm.converted(model).values()))
    words, tables = model.get_input_embeddings().weight, layer.tables
    words.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"model": model, "device": "cpu", "bar": False, "context": 16, "batch": 4, "steps": 1, "lr": 1e-2}
    tokenizer = train(steps=1).tokenizer
    nogemm.train_model(TEXTS, tokenizer=tokenizer, lr_tables=0.0, validation_share=0.1, **options)
    assert words.equal(before["roberta.embeddings.word_embeddings.weight"])
    assert tables.equal(before["roberta.encoder.layer.0.intermediate.tables"])
    assert not words.requires_grad
    assert tables.requires_grad
    moved = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert "roberta.encoder.layer.0.intermediate.projection.weight" in moved


def test_the_caller_keeps_his_random_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    train(steps=1)
    assert draw() == expected


def test_what_does_not_go_together_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(nogemm.ConfigError, match="not both"):
        nogemm.train_model(TEXTS, options=nogemm.TrainOptions(steps=1), preset="laptop")
    with pytest.raises(nogemm.ConfigError, match="micro-batches of 3"):
        train(micro_batch=3)
    with pytest.raises(nogemm.ConfigError, match="model type"):
        train(arch="robertha")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(nogemm.ConfigError, match="no GPU"):
        nogemm.train_model(TEXTS, device="cuda", steps=1)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    with pytest.raises(nogemm.ConfigError, match="3 processes"):
        train()
