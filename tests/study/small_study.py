"""A study of the smallest models, and runs that are made up."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nogemm.study.kinds import Job

RUN = importlib.import_module("nogemm.study.run")  # `nogemm.study` itself names the function
TEXT = """
kind: train
common: {layers: 1, width: 16, heads: 2, context: 16, batch: 4, vocabulary: 290, steps: 4, lr: 1e-2, dropout: 0.0,
         data_tokens: 20000, validation_tokens: 400}
seeds: [0, 1]
"""
ROWS = """
rows:
  - {name: dense, method: dense}
  - {name: lookup, method: lookup, set: {tables: 4, bits: 3, projection.block: 8}}
"""


def write(folder: Path, text: str = TEXT + ROWS, name: str = "small.yaml") -> Path:
    """Write a study file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def outcome(value: float, **more: Any) -> dict[str, Any]:
    """Make up what a run came to."""
    figures = {"validation_loss": value, "perplexity": 2.0, "tokens": 256, "seconds": 8.0, "tokens_per_second": 32.0}
    figures |= {"ffn_flops": 1e6, "ffn_parameters": 1000, "parameters": 5000, "ffns": 1, "history": []}
    return {"status": "done", "figures": figures | more, "report": {"machine": {"line": "Some CPU"}}}


class Fake:
    """Stands in for the processes of runs: remembers the jobs and answers by `value`."""

    def __init__(self, value: Callable[[Job], dict[str, Any]]) -> None:
        self.value = value
        self.jobs: list[Job] = []

    def __call__(self, job: Job, threads: int | None, line: Any, expired: Any) -> dict[str, Any]:
        self.jobs.append(job)
        return self.value(job)

    @property
    def names(self) -> list[str]:
        """Name the runs that were made, as "dense/seed-0"."""
        return ["/".join(Path(job.folder).parts[-2:]) for job in self.jobs]


def faked(monkeypatch: pytest.MonkeyPatch, value: Callable[[Job], dict[str, Any]] | None = None) -> Fake:
    """Put made-up runs in the place of processes."""
    fake = Fake(value or (lambda job: outcome(3.0 + 0.1 * job.options["seed"] + (job.layer or {}).get("tables", 0))))
    monkeypatch.setattr(RUN, "run_process", fake)
    return fake
