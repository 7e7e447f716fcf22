"""What of a study is done, what is left, and how long that will take, judged by the runs that are done."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from nogemm.errors import NogemmError
from nogemm.study.plan import Row
from nogemm.study.store import DONE, Store, Task, read_result


class Expected:
    """Times of the runs to come: a row's own finished runs, scaled by their tokens, else those of the other rows."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def tasks(self, row: Row) -> tuple[list[Task], bool]:
        """Return the runs of a row that have no result, and whether its search may bring more.

        Raises:
            StudyError: a trial was made from other choices than the file's.
        """
        store = self.store
        finals = [store.final(row, seed) for seed in row.seeds]
        left = [task for task in finals if not task.file.is_file()]
        if not left or row.search is None:
            return left, False
        tried, task = store.trials(row)
        if task is None:
            return left, False
        waiting = [store.trial(row, f) for f in row.search.factors if f not in tried]
        return [*(waiting or [task]), *left], True

    def seconds(self, rows: Sequence[Row]) -> float | None:
        """Return how long the runs that are left will take; None: nothing was run yet."""
        speeds = {row.name: speed for row in self.store.study.rows if (speed := self._speed(row)) is not None}
        if not speeds:
            return None
        usual, total = fmean(speeds.values()), 0.0
        for row in rows:
            tasks, _ = self.tasks(row)
            total += sum(self._size(task) for task in tasks) * speeds.get(row.name, usual)
        return total

    def left(self, rows: Sequence[Row]) -> str:
        """Say how much is left in a few words."""
        counts = [self.tasks(row) for row in rows]
        runs, more = sum(len(tasks) for tasks, _ in counts), any(open_ for _, open_ in counts)
        seconds = self.seconds(rows)
        time = "" if seconds is None else f", about {duration(seconds)}"
        return f"{runs}{' or more' if more else ''} runs left{time}"

    def _size(self, task: Task) -> float:
        return self.store.study.kind.budget(task.options) or 1.0

    def _speed(self, row: Row) -> float | None:
        """Return seconds for each token of a row's finished runs."""
        known = []
        for file in sorted((self.store.folder / row.name).glob("*-*.json")):
            try:
                found = read_result(file)
            except NogemmError:
                continue
            if found is not None and found["status"] == DONE and found["figures"].get("seconds"):
                budgeted = self.store.study.kind.budget(row.options) is not None
                known.append(found["figures"]["seconds"] / (found["figures"]["tokens"] if budgeted else 1.0))
        return fmean(known) if known else None


def listing(store: Store, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what is done and what is left of each row, and the time that is expected.

    Returns:
        {"rows": [{"name", "done", "failed", "left", "trials": done, "seconds"}], "seconds"}; seconds are None where
        nothing was run yet.
    """
    expected = Expected(store)
    found = []
    for row in rows:
        finals = [read_result(store.final(row, seed).file) for seed in row.seeds]
        states = [None if result is None else result["status"] for result in finals]
        tasks, more = expected.tasks(row)
        folder = store.folder / row.name
        trials = sum(1 for name in ("rate", "factor") for _ in folder.glob(f"{name}-*.json"))
        found.append(
            {
                "name": row.name,
                "done": states.count(DONE),
                "failed": len(states) - states.count(DONE) - states.count(None),
                "left": states.count(None),
                "trials": trials,
                "trials_left": sum(task.trial for task in tasks),
                "more": more,
                "seconds": expected.seconds([row]),
            }
        )
    return {"rows": found, "seconds": expected.seconds(rows)}


def duration(seconds: float) -> str:
    """Write seconds for a reader: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
