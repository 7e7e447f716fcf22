"""Fine-tuning runs of a second: a BERT of width 16, and rows whose words give their labels away."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import nogemm
from nogemm.train.task.run import FinetuneRun
from people import bert, tokenizer

LOOKUP = nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(rounds=2, block=8))
GOOD, BAD = ["fast", "search", "table"], ["slow", "text", "of"]
QUICK: dict[str, Any] = {
    "batch": 8, "lr": 5e-3, "log_steps": 1, "checkpoint_seconds": 1e9, "validation_share": 0.2, "max_length": 16,
}  # fmt: skip


def rows(count: int = 80, seed: int = 0) -> list[dict[str, Any]]:
    """Make rows of a text, a second one with the same words in front, a label, and a number."""
    source = random.Random(seed)
    out = []
    for _ in range(count):
        good = source.random() < 0.5
        words = [source.choice(GOOD if good else BAD) for _ in range(source.randint(2, 8))]
        second = ["a", *words[:3], source.choice(["the", "a", "of"])]
        out.append({
            "text": " ".join(words), "text2": " ".join(second), "label": "good" if good else "bad",
            "score": 3.0 + (1.0 if good else -1.0) * len(words) / 8,
        })  # fmt: skip
    return out


ROWS = rows()


def converted(folder: Path) -> Path:
    """Save a small BERT with tables for FFNs."""
    model = tf.AutoModel.from_pretrained(bert(folder.with_name(folder.name + "-dense")))
    nogemm.convert(model, LOOKUP)
    layers: Any = nogemm.converted(model).values()
    for layer in layers:
        torch.nn.init.normal_(layer.tables, std=0.3)  # trained ones, as far as saving knows
    nogemm.save(model, folder, tokenizer=tokenizer(folder.with_name(folder.name + "-words")))
    return folder


def tune(model: Any, folder: Path | None = None, data: Any = None, **changes: Any) -> Any:
    """Fine-tune for six steps, or as `changes` say."""
    where = {name: changes.pop(name) for name in ("resume", "tokenizer", "validation", "test") if name in changes}
    budget = {} if {"steps", "epochs", "tokens", "max_seconds"} & changes.keys() else {"steps": 6}
    options = {**QUICK, **budget, **changes}
    return nogemm.finetune(
        model, ROWS if data is None else data, output_dir=folder, device="cpu", bar=False, **where, **options
    )


def log(folder: Path) -> list[dict[str, Any]]:
    """Read a run's log, without the seconds."""
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


def stop_after(step: int, model: Any, folder: Path, patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Fine-tune, and ask the run to stop in the step after this one."""
    with patch.context() as within:
        within.setattr(FinetuneRun, "stop_asked", lambda run: run.step == step)
        with pytest.raises(nogemm.TrainingInterrupted, match="resume=True"):
            tune(model, folder, **changes)
