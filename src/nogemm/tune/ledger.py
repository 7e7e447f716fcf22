"""What a search has found so far: one JSON file a stage, written after every single result, and the time spent.

A search that is stopped anywhere goes on behind its last result: what stands in a file is not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nogemm.files import parse_json, write_json
from nogemm.train.errors import TrainingError

SETTINGS, CLOCK = "settings.json", "clock.json"


class Ledger:
    """Results by stage and key in `folder`, and a clock that all sessions share.

    Args:
        folder: of the run.
        max_seconds: of all sessions together.
    """

    def __init__(self, folder: Path, max_seconds: float) -> None:
        self.folder, self.max_seconds = folder, max_seconds
        self._stages: dict[str, dict[str, Any]] = {}
        before = read_json(folder / CLOCK)
        self._before = float(before["seconds"]) if isinstance(before, dict) else 0.0
        self._stage_seconds: dict[str, float] = dict(before["stages"]) if isinstance(before, dict) else {}
        self._start = self._mark = time.monotonic()

    def take(self, stage: str, key: str, work: Callable[[], Any]) -> Any:
        """Return the result of an earlier session, or do the work and write what it gives, JSON values."""
        known = self.stage(stage)
        if key not in known:
            known[key] = json.loads(json.dumps(work()))  # what a resumed run reads, from the start
            write_json(self.folder / f"{stage}.json", known)
            self.note_time(stage)
        return known[key]

    def stage(self, stage: str) -> dict[str, Any]:
        """Return the results of a stage so far."""
        if stage not in self._stages:
            self._stages[stage] = read_json(self.folder / f"{stage}.json") or {}
        return self._stages[stage]

    def note_time(self, stage: str) -> None:
        """Write the time spent, the last of it in a stage."""
        now = time.monotonic()
        self._stage_seconds[stage] = self._stage_seconds.get(stage, 0.0) + now - self._mark
        self._mark = now
        write_json(self.folder / CLOCK, {"seconds": self.seconds(), "stages": self._stage_seconds})

    def seconds(self) -> float:
        """Return the seconds of all sessions."""
        return self._before + time.monotonic() - self._start

    def left(self) -> float:
        """Return the seconds that the budget has left; below zero it is overdrawn."""
        return self.max_seconds - self.seconds()

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage."""
        return dict(self._stage_seconds)


def begin(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Note what a search depends on, or see that it is the same as when it began.

    Args:
        settings: {"model": ..., "data": ..., "budget": ..., "options": {...}}, JSON values.
    Raises:
        TrainingError: an earlier search without `resume`, or another model, other data, another budget or options.
    """
    now = json.loads(json.dumps(settings))
    before = read_json(folder / SETTINGS)
    if before is None:
        write_json(folder / SETTINGS, now)
        return
    if not resume:
        raise TrainingError(
            f"{folder} holds an earlier search: continue it with resume=True (--resume on the command line), or choose "
            "another directory (--run)"
        )
    for part in ("model", "data", "budget"):
        if before.get(part) != now[part]:
            raise TrainingError(
                f"cannot resume {folder}: it was started with another {part}: {_words(before.get(part))}, now "
                f"{_words(now[part])}"
            )
    old, new = before.get("options", {}), now["options"]
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    different = [f"{name}: {old.get(name)}, now {new.get(name)}" for name in names]
    if different:
        raise TrainingError(f"cannot resume {folder}: it was started with other options: {'; '.join(different)}")


def read_json(file: Path) -> Any:
    """Return what a file holds; None if it is absent or no JSON, so that the work is done again."""
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {str(item)[:40]}" for name, item in value.items())
    return str(value)
