"""Steps that remember: each writes its result beside the demo's files and is not done twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nogemm.errors import ConfigError
from nogemm.files import write_json
from nogemm.running.progress import progress


class Steps:
    """Run named steps in order; one line each, results as JSON under `folder`.

    A step whose result is there already is not run again, so that an interrupted demo goes on where it stopped.
    `settings` say what all results depend on: another version or another choice starts over.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self._number = 0
        stored = self._read(folder / "settings.json")
        if stored is not None and stored != settings:
            raise ConfigError(f"{folder.parent} was made with other settings or another version: add --restart")
        write_json(folder / "settings.json", settings)

    def run(self, name: str, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a step, or take its result from an earlier call; print one line with the time it took.

        While it lasts, progress is shown on standard error, see `nogemm.running.progress`.
        """
        self._number += 1
        file = self.folder / f"{self._number:02d}-{name}.json"
        done = self._read(file)
        label = f"[{self._number:2d}] {what}"
        if done is None:
            print(f"{label} ...", flush=True)
            start = time.monotonic()
            with progress.watching():
                progress(what)
                result = work()
            done = {"seconds": time.monotonic() - start, "result": result}
            write_json(file, done)
            print(f"{label}: {done['result'].get('said', 'done')} ({done['seconds']:.0f} s)", flush=True)
        else:
            print(f"{label}: {done['result'].get('said', 'done')} (earlier, {done['seconds']:.0f} s)", flush=True)
        self.seconds[name] = done["seconds"]
        return done["result"]

    def spent(self) -> float:
        """Return the seconds of all steps so far, of earlier calls, too."""
        return sum(self.seconds.values())

    @staticmethod
    def _read(file: Path) -> Any:
        """Return what a file holds; None if it is absent or no JSON, so that the step is done again."""
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
