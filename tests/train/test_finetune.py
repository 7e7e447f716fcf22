"""Fine-tuning: each task learns, what was trained comes back, and every way of stopping is clean."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_finetuning import ROWS, converted, log, rows, stop_after, tune
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import nogemm
from nogemm.train import checkpoint as ckpt
from nogemm.train.task import trainer as trainer_module
from nogemm.train.task.run import FinetuneRun
from people import bert, edit, gpt2

TEST = rows(40, seed=7)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted(tmp_path_factory.mktemp("finetune") / "model")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nogemm.train.task.metrics.RESAMPLES", 50)


@pytest.mark.parametrize(
    ("changes", "least"),
    [
        ({"task": "classify"}, {"accuracy": 0.8, "macro_f1": 0.8, "matthews": 0.6}),
        ({"task": "pairs", "metric": "macro_f1"}, {"accuracy": 0.8, "macro_f1": 0.8}),
        ({"task": "regress", "label": "score", "metric": "spearman"}, {"pearson": 0.7, "spearman": 0.6}),
        ({"task": "regress", "label": "score", "text2": "text2"}, {"pearson": 0.4}),
        ({"task": "embed"}, {"recall_at_10": 0.5, "mrr_at_10": 0.1}),
    ],
    ids=["classify", "pairs", "regress", "regress pairs", "embed"],
)
def test_each_task_learns(changes: dict[str, Any], least: dict[str, float], model: Path) -> None:
    found = tune(model, steps=100, lr=1e-2, test=TEST, **changes)
    report = found.report
    assert report.metric in least
    for name, value in least.items():
        figure = report.test[name]
        assert figure["value"] > value, name
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["samples"] == len(TEST)
    assert not found.model.training
    assert all(p.grad is None for p in found.model.parameters())
    untrained = tune(model, steps=1, test=TEST, lr=1e-12, **changes)
    assert untrained.report.test[report.metric]["value"] < report.test[report.metric]["value"]


def test_the_result_is_an_ordinary_checkpoint(model: Path, tmp_path: Path) -> None:
    found = tune(model, steps=20)
    layer: Any = next(iter(nogemm.converted(found.model).values()))
    before: Any = next(iter(nogemm.converted(nogemm_base(model)).values()))
    assert not torch.equal(layer.tables, before.tables)  # trained in place
    nogemm.save(found.model, tmp_path / "tuned", tokenizer=found.tokenizer)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "tuned")("fast search of a table", return_tensors="pt")
    with torch.no_grad():
        expected = found.model(**words).logits
        torch.testing.assert_close(loaded(**words).logits, expected)
        packed = nogemm.pack(loaded, dtype="fp32")
        torch.testing.assert_close(packed(**words).logits, expected, rtol=1e-3, atol=1e-3)
    assert loaded.config.id2label == {0: "bad", 1: "good"}
    with pytest.raises(nogemm.PackedError, match="packed"):
        tune(packed, tokenizer=found.tokenizer)
    again = tune(tmp_path / "tuned", steps=1, lr=0.0, lr_head=1e-12)
    assert not again.report.model["new_head"]
    assert again.report.validation["accuracy"] == pytest.approx(found.report.validation["accuracy"])
    nogemm.export(found.model, tmp_path / "exported", tokenizer=found.tokenizer)
    assert (tmp_path / "exported" / "openvino_model.xml").is_file()


def nogemm_base(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("task", ["classify", "pairs"])
def test_a_decoder_is_tuned_by_its_last_token(task: str, tmp_path: Path) -> None:
    found = tune(gpt2(tmp_path / "gpt2"), task=task, steps=2)
    assert found.model.config.pad_token_id == found.tokenizer.pad_token_id
    nogemm.save(found.model, tmp_path / "tuned", tokenizer=found.tokenizer)
    again = tune(tmp_path / "tuned", task=task, steps=1, lr=1e-12)
    assert again.report.validation["accuracy"] == found.report.validation["accuracy"]


def test_embeddings_come_back_as_a_sentence_transformer(model: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    found = tune(model, task="embed", pooling="cls")
    nogemm.save(found.model, tmp_path / "tuned", tokenizer=found.tokenizer)
    loaded = SentenceTransformer(str(tmp_path / "tuned"), device="cpu", local_files_only=True)
    texts = ["a fast table", "slow"]
    np.testing.assert_allclose(loaded.encode(texts), found.model.encode(texts), rtol=1e-5, atol=1e-6)
    assert loaded[1].pooling_mode == "cls"
    again = tune(tmp_path / "tuned", task="embed", steps=1)
    assert again.report.model["ffn"] == found.report.model["ffn"]
    with pytest.raises(nogemm.ConfigError, match=r"modules\.json.*pooling='max'"):
        tune(tmp_path / "tuned", task="embed", pooling="max")


def test_micro_batches_change_nothing_but_rounding(model: Path, tmp_path: Path) -> None:
    plain = nogemm_base(model).config  # dropout draws anew for each forward pass: without it
    assert plain.hidden_dropout_prob == 0.1
    for task in ("classify", "embed"):
        losses = {}
        for micro in (None, 4):
            folder = tmp_path / f"{task}{micro}"
            tune(without_dropout(model, tmp_path), folder, task=task, micro_batch=micro, steps=3)
            losses[micro] = [row["loss"] for row in log(folder) if row["loss"] is not None]
        assert losses[4] == pytest.approx(losses[None], rel=1e-4)
        tune(without_dropout(model, tmp_path), tmp_path / f"{task}-half", task=task, batch=4, steps=3)
        half = [row["loss"] for row in log(tmp_path / f"{task}-half") if row["loss"] is not None]
        assert half != pytest.approx(losses[None], rel=1e-4)


def without_dropout(model: Path, folder: Path) -> Path:
    target = folder / "still"
    if not target.exists():
        shutil.copytree(model, target)
        edit(target / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return target


@pytest.mark.parametrize("changes", [
    {"validate_steps": 2}, {"task": "embed", "validate_steps": 3}, {"optimizer": "lazy-adam", "tokens": 250},
], ids=["classify", "embed", "lazy-adam"])  # fmt: skip
def test_a_stopped_run_ends_with_the_same_losses(
    changes: dict[str, Any], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(model, tmp_path / "whole", **changes).report
    stop_after(3, model, tmp_path / "parts", monkeypatch, **changes)
    assert [row["step"] for row in log(tmp_path / "parts")] == [1, 2, 3, 4]
    parts = tune(model, tmp_path / "parts", resume=True, **changes).report
    assert log(tmp_path / "parts") == log(tmp_path / "whole")  # bit by bit
    assert (parts.best, parts.validation, parts.steps) == (whole.best, whole.validation, whole.steps)
    tune(model, tmp_path / "other", seed=1, **changes)
    assert log(tmp_path / "other") != log(tmp_path / "whole")


def test_the_best_state_is_kept_also_across_a_stop(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = dict(tune(model, validate_steps=7).model.named_parameters())  # measured once: its last state is its best
    values = iter([0.2, 0.9, 0.3, 0.2, 0.9, 0.3])
    plain = FinetuneRun.measure

    def measure(run: FinetuneRun, trainer: Any) -> dict[str, float]:
        value = next(values)
        monkeypatch.setattr(
            "nogemm.train.task.run.measured",
            lambda *_: {"validation_loss": 1.0, "accuracy": value, "macro_f1": 0.0, "matthews": 0.0},
        )
        return plain(run, trainer)

    monkeypatch.setattr(FinetuneRun, "measure", measure)
    whole = tune(model, validate_steps=2)
    assert whole.report.best["step"] == 4
    assert [row["accuracy"] for row in whole.report.history] == [0.2, 0.9, 0.3]
    stop_after(4, model, tmp_path / "parts", monkeypatch, validate_steps=2)
    assert [path.name for path in (tmp_path / "parts").glob("best-*")] == ["best-00000004"]
    parts = tune(model, tmp_path / "parts", resume=True, validate_steps=2)
    assert list((tmp_path / "parts").glob("best-*")) == []
    names = dict(whole.model.named_parameters())
    assert all(value.equal(names[name]) for name, value in parts.model.named_parameters())
    assert not all(value.equal(names[name]) for name, value in last.items())


def test_a_finished_run_gives_its_report_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tune(model, tmp_path, test=TEST, validate_steps=2)
    monkeypatch.setattr(trainer_module.LabelTrainer, "training_step", None)  # nothing is trained
    monkeypatch.setattr(trainer_module.LabelTrainer, "answers", None)  # nor tested once more
    again = tune(model, tmp_path, test=TEST, validate_steps=2, resume=True)
    assert again.report == first.report
    assert all(a.equal(b) for a, b in zip(again.model.parameters(), first.model.parameters(), strict=True))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(model, tmp_path / "whole")
    plain = trainer_module.LabelTrainer.compute_loss
    calls: list[int] = []

    def broken(trainer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return plain(trainer, *args, **kwargs) * (math.nan if len(calls) == 3 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.LabelTrainer, "compute_loss", broken)
        with pytest.raises(nogemm.TrainingError, match=r"nan at step 3; gradients .*tables.*head.*step-00000002"):
            tune(model, tmp_path / "parts", checkpoint_steps=1)
    tune(model, tmp_path / "parts", resume=True)
    assert log(tmp_path / "parts") == log(tmp_path / "whole")


def test_the_group_that_blew_up_is_named(model: Path) -> None:
    with pytest.raises(nogemm.TrainingError, match="weights that are not finite: tables"):
        tune(model, lr_tables=1e39, clip=0.0, warmup=0.0)


def test_answers_that_are_not_finite_are_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trainer_module.LabelTrainer, "answered", lambda trainer, part, count: np.full((count, 2), math.nan)
    )
    with pytest.raises(nogemm.TrainingError, match=r"answers to \d+ of \d+ validation rows are not finite"):
        tune(model)


@pytest.mark.parametrize("place", ["step-00000002", "best-00000002"])
def test_a_full_disk_is_an_error_that_says_what_is_kept(
    place: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ckpt.save_file

    def full(tensors: Any, path: Path) -> None:
        if place in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(ckpt, "save_file", full)
        with pytest.raises(nogemm.TrainingError, match=r"step 2 .*No space.*step-00000001"):
            tune(model, tmp_path, checkpoint_steps=1, validate_steps=2)
    assert not [path for path in tmp_path.iterdir() if ".tmp-" in path.name]
    assert tune(model, tmp_path, resume=True, validate_steps=2).report.steps == 6


def test_two_runs_in_one_directory_are_refused(model: Path, tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(nogemm.TrainingError, match="another run is writing"):
            tune(model, tmp_path)
    tune(model, tmp_path, steps=1)
    with pytest.raises(nogemm.TrainingError, match="holds an earlier run"):
        tune(model, tmp_path, steps=1)
    with pytest.raises(nogemm.TrainingError, match=r"another kind of run \(nogemm distil or nogemm finetune\)"):
        nogemm.train_model(["a text of words"] * 50, output_dir=tmp_path, resume=True, device="cpu", steps=1, layers=1)


def test_a_resumed_run_wants_its_options_its_data_and_its_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    stop_after(1, model, run, monkeypatch)
    with pytest.raises(nogemm.TrainingError, match=r"other options: steps: 6, now 9"):
        tune(model, run, resume=True, steps=9)
    with pytest.raises(nogemm.DataError, match=r"other data"):
        tune(model, run, data=rows(80, seed=3), resume=True)
    other = [{**row, "label": {"good": "bad", "bad": "good"}[row["label"]]} for row in ROWS]
    with pytest.raises(nogemm.DataError, match=r"other data"):
        tune(model, run, data=other, resume=True)
    with pytest.raises(nogemm.TrainingError, match="holds another model"):
        tune(bert(tmp_path / "dense"), run, resume=True)
    assert tune(model, run, resume=True, log_steps=2).report.steps == 6


def test_time_is_a_budget_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FinetuneRun, "seconds", lambda run: 10.0 * run.step)
    assert tune(model, max_seconds=35.0).report.steps == 5  # the first step that begins after the end is the last


def test_tokens_and_epochs_are_budgets(model: Path) -> None:
    report = tune(model, tokens=100).report
    assert 100 <= report.tokens < 100 + 8 * 10
    whole = tune(model, epochs=2.0).report
    assert whole.steps == math.ceil(2 * whole.data["rows"]["train"] / 8)
    assert [row["step"] for row in whole.history] == [math.ceil(whole.data["rows"]["train"] / 8), whole.steps]


def test_the_log_is_json_and_csv(model: Path, tmp_path: Path) -> None:
    tune(model, tmp_path, log_steps=2, validate_steps=3)
    found = log(tmp_path)
    assert [row["step"] for row in found] == [2, 3, 5, 6]
    assert [row["accuracy"] is not None for row in found] == [False, True, False, True]
    with open(tmp_path / "log.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in found]
    assert {"validation_loss", "accuracy", "macro_f1", "matthews"} <= table[0].keys()


def test_the_report_says_what_was_done_and_nothing_of_the_machine(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    report = tune(model, tmp_path / "run", data=data).report.to_dict()
    assert json.loads(json.dumps(report)) == report
    assert str(tmp_path) not in json.dumps(report)
    assert report["data"]["source"] == "rows.jsonl"
    assert report["data"]["labels"].keys() == {"bad", "good"}
    assert sum(report["data"]["rows"].values()) == len(ROWS)
    assert report["test"] is None
    assert {"torch", "transformers", "accelerate", "nogemm"} <= set(report["machine"]["versions"])


def test_what_has_no_rate_stays_as_it_is(model: Path) -> None:
    before = nogemm_base(model).state_dict()
    after = tune(model, lr_backbone=0.0, lr_tables=0.0).model.base_model.state_dict()
    moved = [name for name, value in before.items() if not value.equal(after[name])]
    assert moved
    assert all("intermediate." in name and "tables" not in name for name in moved)


def test_the_caller_keeps_his_random_numbers(model: Path) -> None:
    random.seed(1)
    torch.manual_seed(1)
    expected = random.random(), float(torch.rand(()))
    random.seed(1)
    torch.manual_seed(1)
    tune(model, steps=1)
    assert (random.random(), float(torch.rand(()))) == expected
