"""`nogemm finetune`: what it prints, writes and refuses; two processes; a run that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_finetuning import ROWS, converted, log, rows
from transformers import AutoModelForSequenceClassification

import nogemm
from people import edit, run

SMALL = ["--batch", 8, "--lr", "5e-3", "--max-length", 16, "--device", "cpu", "--option", "log_steps=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = converted(tmp_path_factory.mktemp("finetune-command") / "model")
    edit(folder / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows(20, seed=9)))
    return tmp_path / "rows.jsonl"


def start(
    model: Path, folder: Path, data: Path, *words: object, launcher: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    command = [sys.executable, *launcher, "-m", "nogemm", "finetune", model, folder, "--data", data, *SMALL, *words]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | settings,
    )  # fmt: skip


def test_a_model_is_tuned_written_and_reported(
    model: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nogemm.train.task.metrics.RESAMPLES", 50)
    output, facts = tmp_path / "tuned", tmp_path / "facts.json"
    words = ["finetune", model, output, "--data", data, "--test", tmp_path / "test.jsonl", *SMALL, "--steps", 3]
    assert run(*words, "--json", facts) == 0
    said = capsys.readouterr().out
    assert "best accuracy on" in said
    assert "test matthews" in said
    report = json.loads(facts.read_text())
    assert report["kind"] == "finetune"
    assert report["test"]["accuracy"]["samples"] == 20
    assert str(tmp_path) not in facts.read_text()
    loaded = AutoModelForSequenceClassification.from_pretrained(output)
    assert {layer.config.kind for layer in nogemm.converted(loaded).values()} == {"lookup"}
    assert (output / "tokenizer.json").is_file()
    assert len(log(tmp_path / "tuned-run")) == 4
    assert run(*words) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(*words, "--resume") == 0
    (tmp_path / "labels.jsonl").write_text("\n".join(json.dumps(row) for row in rows(20, seed=9)))
    assert run("eval", output, "--task", "classify", "--data", tmp_path / "labels.jsonl", "--json", facts) == 0
    value = json.loads(facts.read_text())["ours"]["accuracy"]["value"]
    assert value == pytest.approx(report["test"]["accuracy"]["value"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--task", "nli"), "classify, pairs, regress, embed"),
        (("--option", "colour=3"), "no option 'colour'"),
        (("--option", "colour"), "--option 'colour': expected NAME=VALUE"),
        (("--metric", "pearson"), "accuracy, macro_f1, matthews"),
        (("--label", "section"), "has no field 'section'; it has: text, text2, label, score"),
        (("--data", "nothing.csv"), "nothing.csv"),
        (("--validation", "nothing.csv"), "nothing.csv"),
    ],
)
def test_wrong_words_end_in_one_line(
    words: tuple[str, ...], said: str, model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("finetune", model, tmp_path / "out", "--data", data, "--steps", 1, *words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert said in err[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [(), ("--task", "embed"), ("--task", "regress", "--label", "score")], ids=["classify", "embed", "regress"]
)
def test_two_processes_train_as_one_does(words: tuple[Any, ...], model: Path, tmp_path: Path, data: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    common = [*words, "--steps", 5, "--option", "validate_steps=2", "--test", tmp_path / "test.jsonl"]
    for name, launcher in (("one", ()), ("two", torchrun)):
        process = start(
            model, tmp_path / name, data, *common, "--json", tmp_path / f"{name}.json", launcher=launcher
        )  # fmt: skip
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.count("validation rows") == 1
    one, two = log(tmp_path / "one-run"), log(tmp_path / "two-run")
    assert len(one) == len(two) >= 5
    for name in set(one[0]) - {"step"}:
        values = [[row[name] for row in found if row[name] is not None] for found in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5), name
    reports = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two")]
    assert reports[1]["processes"] == 2
    assert reports[1]["best"]["step"] == reports[0]["best"]["step"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        if not name.endswith("key.bias"):  # attention does not depend on it: its gradient is rounding alone
            assert value.allclose(weights[1][name], rtol=1e-2, atol=2e-3), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_ends_with_the_same_losses(
    number: signal.Signals, model: Path, tmp_path: Path, data: Path
) -> None:
    words = ["--steps", 60, "--option", "checkpoint_steps=1", "--option", "validate_steps=4"]
    whole = start(model, tmp_path / "whole", data, *words)
    assert whole.wait(300) == 0
    parts = start(model, tmp_path / "parts", data, *words)
    found = tmp_path / "parts-run" / "log.jsonl"
    while parts.poll() is None and (not found.is_file() or found.read_text().count("\n") < 5):
        time.sleep(0.005)
    parts.send_signal(number)
    _, err = parts.communicate(timeout=300)
    assert parts.returncode == (-9 if number == signal.SIGKILL else 130), err
    assert len(log(tmp_path / "parts-run")) < 60
    again = start(model, tmp_path / "parts", data, *words, "--resume")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert log(tmp_path / "parts-run") == log(tmp_path / "whole-run")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(value.equal(weights[1][name]) for name, value in weights[0].items())
