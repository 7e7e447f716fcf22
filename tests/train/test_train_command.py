"""`nogemm train`: what it prints, writes and refuses; two processes; a run that is killed."""

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
from tiny_runs import TEXTS, log
from transformers import AutoModelForMaskedLM

import nogemm
from nogemm.cli.train import layer_of
from people import run

SMALL = [
    "--layers", 1, "--width", 16, "--heads", 2, "--context", 16, "--batch", 4, "--vocabulary", 290, "--device", "cpu",
    "--option", "log_steps=1", "--option", "validation_share=0.1", "--option", "dropout=0.0",
]  # fmt: skip
LOOKUP = ["--method", "lookup", "--set", "tables=4", "--set", "bits=3", "--set", "projection.block=8"]
TREE = ["--method", "tree", "--set", "trees=2", "--set", "depth=3", "--optimizer", "lazy-adam"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    return tmp_path / "texts.txt"


def start(folder: Path, data: Path, *words: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start the command in a process of its own."""
    command = [sys.executable, *launcher, "-m", "nogemm", "train", folder, "--data", data, *SMALL, *words]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | settings,
    )  # fmt: skip


def test_a_model_is_trained_written_and_reported(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, facts = tmp_path / "model", tmp_path / "facts.json"
    words = ["train", model, "--data", data, "--preset", "laptop", *SMALL, *LOOKUP, "--steps", 3, "--json", facts]
    assert run(*words) == 0
    assert "validation loss" in capsys.readouterr().out
    report = json.loads(facts.read_text())
    assert report["preset"]["preset"] == "laptop"
    assert report["preset"]["preset_options"]["width"] == 128
    assert report["preset"]["overrides"]["width"] == 16
    assert report["options"]["tokens"] is None  # --steps took the place of the preset's budget
    assert str(tmp_path) not in facts.read_text()
    loaded = AutoModelForMaskedLM.from_pretrained(model)
    assert [layer.config.kind for layer in nogemm.converted(loaded).values()] == ["lookup"]
    assert (model / "tokenizer.json").is_file()
    assert len(log(tmp_path / "model-run")) == 4
    assert run(*words) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(*words, "--resume") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "budget"),
        (("--preset", "huge"), "lookupffn, hire, laptop"),
        (("--steps", "1", "--option", "colour=3"), "no option 'colour'"),
        (("--steps", "1", "--option", "colour"), "--option 'colour': expected NAME=VALUE"),
        (("--steps", "1", "--method", "lookup", "--set", "trees=3"), "no field 'trees'"),
        (("--steps", "1", "--data", "nothing.txt"), "nothing.txt"),
        (("--steps", "1", "--model", "nowhere"), "nowhere"),
    ],
)
def test_wrong_words_end_in_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", tmp_path / "model", *words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert said in err[-1]
    assert not (tmp_path / "model").exists()


def test_fields_without_a_method_change_the_presets_layer() -> None:
    assert layer_of(None, ["bits=4"], "lookupffn") == nogemm.LookupConfig(
        tables=256, bits=4, norm=False, init="reference"
    )
    assert layer_of(None, ["group=1"], "hire") == nogemm.HireConfig(keep=0.05, group=1)
    assert layer_of("tree", ["depth=3"], "hire") == nogemm.TreeConfig(depth=3)
    assert layer_of(None, ["tables=3"], "laptop") == nogemm.LookupConfig(tables=3)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [LOOKUP, TREE], ids=["dense gradients", "gradients of rows"])
def test_two_processes_train_as_one_does(layer: list[Any], tmp_path: Path, data: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    common = [*layer, "--steps", 5, "--option", "micro_batch=1"]
    for name, launcher in (("one", ()), ("two", torchrun)):
        process = start(tmp_path / name, data, *common, "--json", tmp_path / f"{name}.json", launcher=launcher)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert out.count("validation loss") == 1
    one, two = log(tmp_path / "one-run"), log(tmp_path / "two-run")
    for name in ("loss", "gradient_norm", "validation_loss"):
        values = [[row[name] for row in rows if row[name] is not None] for rows in (one, two)]
        assert len(values[0]) >= 1
        assert values[1] == pytest.approx(values[0], rel=1e-4)
    assert json.loads((tmp_path / "two.json").read_text())["processes"] == 2
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        assert value.allclose(weights[1][name], rtol=1e-3, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_ends_with_the_same_losses(number: signal.Signals, tmp_path: Path, data: Path) -> None:
    words = [*LOOKUP, "--steps", 60, "--option", "checkpoint_steps=1"]
    whole = start(tmp_path / "whole", data, *words)
    assert whole.wait(300) == 0
    parts = start(tmp_path / "parts", data, *words)
    rows = tmp_path / "parts-run" / "log.jsonl"
    while parts.poll() is None and (not rows.is_file() or rows.read_text().count("\n") < 5):
        time.sleep(0.005)
    parts.send_signal(number)
    _, err = parts.communicate(timeout=300)
    assert parts.returncode == (-9 if number == signal.SIGKILL else 130), err
    assert len(log(tmp_path / "parts-run")) < 60
    again = start(tmp_path / "parts", data, *words, "--resume")
    _, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert log(tmp_path / "parts-run") == log(tmp_path / "whole-run")
