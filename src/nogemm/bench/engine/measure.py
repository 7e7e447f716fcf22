"""Time contenders against each other: one worker process each, one running at a time, round after round.

The rules, each here because breaking it has produced wrong tables elsewhere:
- one process per engine, so that thread pools, allocators and settings of two engines never meet;
- the parent lets one worker run at a time; the others sleep in a read, their pools wait passively;
- equal threads; at least seven rounds; the order turns every round, so that a slow minute hits everybody;
- a contender is compared with its reference in its own process before any clock starts; a mismatch is a row without
  a time;
- figures are medians with p10 and p90 over all calls of all rounds; where a run was stopped, or ran out of time, a row
  says in "rounds" how many there were, or in "skipped" that there was none.

Reading order: Spec and Plan, `measure`, its table; a worker is spoken to in `worker_process.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from nogemm.bench.engine.row import Row
from nogemm.bench.engine.worker_process import WorkerProcess

MIN_ROUNDS = 7
Note = Callable[[str], None]
KeepRows = Callable[[list[Row]], None]
NOT_REACHED = "not reached"
OUT_OF_TIME = "out of time"
_PREPARING = 0.6  # of all the time: contenders that are not ready by then are left out of the first case, and of all


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Name a contender and say how its worker makes it.

    Attributes:
        name: as it stands in the table.
        factory: "module:callable"; the worker calls it with `settings` and gets a `worker.Contender`.
        settings: JSON-able.
        missing: what to install if the contender cannot run here; it then gets a row and no worker.
    """

    name: str
    factory: str
    settings: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say how long and on what to measure.

    Attributes:
        threads: of every contender.
        rounds: turns each contender gets per case.
        seconds: aimed at per turn; at least one call is made whatever it takes.
        max_calls: per turn.
        patience: seconds a worker may take to answer before its row fails.
        longest_call: seconds; a contender whose call takes longer is not called again, and its row says so.
        seconds_in_all: nothing new is begun after it; the rows that are left say so.
    """

    threads: int
    rounds: int = MIN_ROUNDS
    seconds: float = 0.1
    max_calls: int = 200
    patience: float = 900.0
    longest_call: float = float("inf")
    seconds_in_all: float = float("inf")


_TRIALS: list[None] = []


@contextmanager
def trial_runs() -> Iterator[None]:
    """Within the block, let runs have fewer rounds than a median can be trusted after: their rows say how many."""
    _TRIALS.append(None)
    try:
        yield
    finally:
        _TRIALS.pop()


def measure(
    specs: Sequence[Spec],
    cases: Sequence[dict[str, Any]],
    plan: Plan,
    *,
    note: Note | None = None,
    keep: KeepRows | None = None,
) -> list[Row]:
    """Verify and time every contender on every case.

    Args:
        specs: contenders; each one's worker lives for the whole run.
        cases: JSON-able; handed to the contender's `prepare`.
        note: called with a line of progress.
        keep: called whenever something is known, with all rows as they are then: copies.
    Returns:
        One row per case and contender, in that order: {"contender", **case, "verified", ...facts the contender gave}
        and, only if verified, "us_median", "us_p10", "us_p90", "calls"; otherwise "error", "missing" or "skipped".
        "rounds" where time ran out before all of them, and in trial runs.
    Raises:
        ValueError: fewer than seven rounds.
    """
    if plan.rounds < MIN_ROUNDS and not _TRIALS:
        raise ValueError(f"at least {MIN_ROUNDS} rounds are needed for a median that can be trusted, got {plan.rounds}")
    table = _Table(specs, cases, plan, note or (lambda line: None), keep or (lambda rows: None))
    workers: dict[str, WorkerProcess] = {}
    try:
        for spec in specs:
            if spec.missing is None:
                first = {"factory": spec.factory, "settings": spec.settings, "threads": plan.threads}
                workers[spec.name] = WorkerProcess(first, plan.patience)
        for number in range(len(cases)):
            table.prepare(number, workers)
            table.time(number, workers)
        return table.rows()
    except BaseException:
        for worker in workers.values():  # whoever stops a run may not wait until they have finished what they do
            worker.close(grace=0.0)
        raise
    finally:
        for worker in workers.values():
            worker.close()


def turned(names: Sequence[str], turn: int) -> list[str]:
    """Return all names, beginning with another one each turn: being first must favour none of them."""
    start = turn % max(1, len(names))
    return [*names[start:], *names[:start]]


def summary(us: Sequence[float]) -> dict[str, float]:
    """Return median, p10 and p90 of times, in the unit given."""
    p10, median, p90 = np.percentile(np.asarray(us, dtype=float), [10, 50, 90])
    return {"us_median": float(median), "us_p10": float(p10), "us_p90": float(p90)}


def add_ratios(rows: Sequence[Row], ours: str, keys: Sequence[str]) -> None:
    """Give each timed row ratio = its median / ours, of the same case and run (above 1: ours is faster).

    `keys` name the case; a row without a time, or beside an unverified row of ours, gets None.
    """
    base = {
        _case(row, keys): row["us_median"]
        for row in rows
        if row["contender"] == ours and row.get("us_median") is not None
    }
    for row in rows:
        mine = base.get(_case(row, keys))
        time = row.get("us_median")
        row["ratio"] = time / mine if mine and time is not None else None


class _Table:
    """All rows of a run, from "not reached" to their figures."""

    def __init__(
        self, specs: Sequence[Spec], cases: Sequence[dict[str, Any]], plan: Plan, say: Note, keep: KeepRows
    ) -> None:
        self.cases, self.plan, self.say, self._keep = cases, plan, say, keep
        self.cells: list[dict[str, Row]] = [
            {
                spec.name: cast(
                    "Row",
                    {"contender": spec.name, **case, "verified": False}
                    | ({"skipped": NOT_REACHED} if spec.missing is None else {"missing": spec.missing}),
                )
                for spec in specs
            }
            for case in cases
        ]
        self._late: set[str] = set()
        self._start = time.monotonic()

    def rows(self) -> list[Row]:
        """Return copies of the rows, case by case."""
        return [copy.copy(row) for cells in self.cells for row in cells.values()]

    def prepare(self, number: int, workers: dict[str, WorkerProcess]) -> None:
        """Build and verify every contender for a case."""
        self._keep(self.rows())
        label = _label(self.cases[number])
        in_turn = list(workers.values())
        for place, (name, worker) in enumerate(workers.items()):
            row = self.cells[number][name]
            if name in self._late or self._spent() > (1.0 if number else _PREPARING):
                self._late.add(name)
                row["skipped"] = OUT_OF_TIME
                worker.close(grace=0.0)
                continue
            # The next one starts up meanwhile. All of them at once would keep the first from its turn for minutes.
            for upcoming in in_turn[place : place + 2]:
                upcoming.start()
            self.say(f"{label} {name}: preparing")
            answer = worker.ask({"do": "prepare", "case": self.cases[number]})
            del row["skipped"]
            row.update(cast("Row", answer))
            self.say(f"{label} {name}: {_verdict(row)}")
            self._keep(self._unfinished(number))

    def time(self, number: int, workers: dict[str, WorkerProcess]) -> None:
        """Time what was verified, round after round; leave medians."""
        rows = self.cells[number]
        ready = [name for name, row in rows.items() if row["verified"]]
        times: dict[str, list[float]] = {name: [] for name in ready}
        for turn in range(self.plan.rounds):
            if turn and self._spent() > 1.0:
                break
            for name in turned(ready, turn):
                self._turn(rows[name], workers[name], times[name])
                if "error" in rows[name] or "skipped" in rows[name]:
                    ready.remove(name)
            for name in ready:
                figures = summary(times[name]) | {"calls": len(times[name]), "rounds": turn + 1}
                rows[name].update(cast("Row", figures))
            self.say(f"{_label(self.cases[number])} round {turn + 1} of {self.plan.rounds}")
            self._keep(self.rows())
        for name in ready:
            if rows[name]["rounds"] == self.plan.rounds >= MIN_ROUNDS:
                del rows[name]["rounds"]

    def _turn(self, row: Row, worker: WorkerProcess, times: list[float]) -> None:
        answer = worker.ask({"do": "time", "seconds": self.plan.seconds, "max_calls": self.plan.max_calls})
        if "us" not in answer:
            row.update(cast("Row", answer | {"verified": False}))
        else:
            times += answer["us"]
            call = max(answer["us"]) * row.get("layers", 1) * 1e-6
            if call <= self.plan.longest_call:
                return
            row["skipped"] = f"one call took {call:.1f} s, more than {self.plan.longest_call:g} s"
        for figure in ("us_median", "us_p10", "us_p90", "calls", "rounds"):  # of the rounds before
            row.pop(figure, None)

    def _unfinished(self, number: int) -> list[Row]:
        """Return the rows while a case is prepared: its verified ones have no time yet."""
        rows = self.rows()
        case = self.cases[number]
        for row in rows:
            if row["verified"] and "us_median" not in row and case.items() <= row.items():
                row["skipped"] = "verified, not timed"
        return rows

    def _spent(self) -> float:
        """Return which part of the time is over."""
        return (time.monotonic() - self._start) / self.plan.seconds_in_all


def _case(row: Row, keys: Sequence[str]) -> tuple[Any, ...]:
    values: Mapping[str, Any] = row
    return tuple(values[key] for key in keys)


def _label(case: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in case.items())


def _verdict(row: Row) -> str:
    return "verified" if row["verified"] else f"refused: {row.get('error', 'no reason given')}"
