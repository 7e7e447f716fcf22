"""Other processes beside threads that spin: a training says what helps, once, and only where it would."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from nogemm.hardware.load import Others
from nogemm.hardware.waiting import VARIABLES
from nogemm.train.progress import Progress


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "nogemm.train"), Progress(0.0, False) as progress:
        progress.begin(0.0, 0)
        for step in range(3):
            progress.update("training", 0.1 * step, 100, 1.0)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    ("cores", "threads", "variables", "said"),
    [(1.0, 2, {}, 1), (0.1, 2, {}, 0), (None, 2, {}, 0), (1.0, 1, {}, 0), (1.0, 2, VARIABLES, 0)],
)
def test_a_training_says_what_helps_beside_others(
    cores: float | None,
    threads: int,
    variables: dict[str, str],
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in (*VARIABLES, "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Others, "cores", lambda others: cores)
    torch.set_num_threads(threads)
    found = warnings_of(caplog)
    assert len(found) == said
    assert all("GOMP_SPINCOUNT=1000" in text and "1.0 cores" in text for text in found)


def test_others_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((10.0, 10.0 + 1e9))
    monkeypatch.setattr("nogemm.hardware.load._busy_seconds", lambda: next(seconds))
    found: Any = Others().cores()
    assert found > 1e3
