"""Training runs of a second: a model of width 16 on made-up texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_training import make_texts

import nogemm
from nogemm.train.lm.run import Run

LOOKUP = nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(rounds=2, block=8))
TINY: dict[str, Any] = {
    "layers": 1, "width": 16, "heads": 2, "context": 16, "batch": 4, "vocabulary": 290, "lr": 1e-2, "log_steps": 1,
    "checkpoint_seconds": 1e9, "validation_share": 0.1, "dropout": 0.1, "validation_tokens": 400,
}  # fmt: skip
TEXTS = make_texts(150)


def train(folder: Path | None = None, data: Any = TEXTS, **changes: Any) -> Any:
    """Train for four steps, or as `changes` say."""
    where = {name: changes.pop(name) for name in ("resume", "model", "tokenizer", "validation") if name in changes}
    options = {**TINY, "steps": 4, **changes}
    return nogemm.train_model(data, output_dir=folder, device="cpu", bar=False, **where, **options)


def log(folder: Path) -> list[dict[str, Any]]:
    """Read a run's log, without the seconds."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def stop_after(step: int, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Train, and ask the run to stop in the step after this one."""
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stop_asked", lambda run: run.step == step)
        with pytest.raises(nogemm.TrainingInterrupted, match="resume=True"):
            train(folder, **changes)
