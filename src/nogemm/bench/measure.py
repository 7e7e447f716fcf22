"""Time contenders against each other: one worker process each, one running at a time, round after round.

The rules, each here because breaking it has produced wrong tables elsewhere:
- one process per engine, so that thread pools, allocators and settings of two engines never meet;
- the parent lets one worker run at a time; the others sleep in a read, their pools wait passively;
- equal threads; at least seven rounds; the order turns every round, so that a slow minute hits everybody;
- a contender is compared with its reference in its own process before any clock starts; a mismatch is a row without
  a time;
- figures are medians with p10 and p90 over all calls of all rounds.

Reading order: Spec and Plan, `measure`, the worker's handle.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MIN_ROUNDS = 7
Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Name a contender and say how its worker makes it.

    Attributes:
        name: as it stands in the table.
        factory: "module:callable"; the worker calls it with `settings` and gets a `nogemm.bench.worker.Contender`.
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
    """

    threads: int
    rounds: int = MIN_ROUNDS
    seconds: float = 0.1
    max_calls: int = 200
    patience: float = 900.0
    longest_call: float = float("inf")


def measure(
    specs: Sequence[Spec],
    cases: Sequence[dict[str, Any]],
    plan: Plan,
    *,
    note: Note | None = None,
    _min_rounds: int = MIN_ROUNDS,
) -> list[dict[str, Any]]:
    """Verify and time every contender on every case.

    Args:
        specs: contenders; each one's worker lives for the whole run.
        cases: JSON-able; handed to the contender's `prepare`.
        note: called with a line of progress.
    Returns:
        One row per case and contender, in that order: {"contender", **case, "verified", ...facts the contender gave}
        and, only if verified, "us_median", "us_p10", "us_p90", "calls"; otherwise "error", "missing" or "skipped".
    Raises:
        ValueError: fewer than seven rounds.
    """
    if plan.rounds < _min_rounds:
        raise ValueError(
            f"at least {_min_rounds} rounds are needed for a median that can be trusted, got {plan.rounds}"
        )
    say = note or (lambda line: None)
    workers: dict[str, _Worker] = {}
    try:
        for spec in specs:
            if spec.missing is None:
                workers[spec.name] = _Worker(spec, plan)
        rows = []
        for case in cases:
            rows += _measure_case(specs, case, plan, workers, say)
        return rows
    finally:
        for worker in workers.values():
            worker.close()


def summary(us: Sequence[float]) -> dict[str, float]:
    """Return median, p10 and p90 of times, in the unit given."""
    p10, median, p90 = np.percentile(np.asarray(us, dtype=float), [10, 50, 90])
    return {"us_median": float(median), "us_p10": float(p10), "us_p90": float(p90)}


def add_ratios(rows: Sequence[dict[str, Any]], ours: str, keys: Sequence[str]) -> None:
    """Give each timed row ratio = its median / ours, of the same case and run (above 1: ours is faster).

    `keys` name the case; a row without a time, or beside an unverified row of ours, gets None.
    """
    base = {
        tuple(row[key] for key in keys): row["us_median"]
        for row in rows
        if row["contender"] == ours and row.get("us_median") is not None
    }
    for row in rows:
        mine = base.get(tuple(row[key] for key in keys))
        time = row.get("us_median")
        row["ratio"] = time / mine if mine and time is not None else None


def _measure_case(
    specs: Sequence[Spec], case: dict[str, Any], plan: Plan, workers: dict[str, _Worker], say: Note
) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for spec in specs:
        row: dict[str, Any] = {"contender": spec.name, **case, "verified": False}
        if spec.missing is not None:
            row["missing"] = spec.missing
        else:
            row |= workers[spec.name].ask({"do": "prepare", "case": case})
            say(f"{_label(case)} {spec.name}: {_verdict(row)}")
        rows[spec.name] = row
    ready = [name for name, row in rows.items() if row["verified"]]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(plan.rounds):
        for name in ready[turn % len(ready) :] + ready[: turn % len(ready)] if ready else ():
            answer = workers[name].ask({"do": "time", "seconds": plan.seconds, "max_calls": plan.max_calls})
            if "us" not in answer:
                rows[name] |= answer | {"verified": False}
                continue
            times[name] += answer["us"]
            call = max(answer["us"]) * rows[name].get("layers", 1) * 1e-6
            if call > plan.longest_call:
                rows[name]["skipped"] = f"one call took {call:.1f} s, more than {plan.longest_call:g} s"
                ready.remove(name)
        say(f"{_label(case)} round {turn + 1} of {plan.rounds}")
    for name, us in times.items():
        if rows[name]["verified"] and "skipped" not in rows[name]:
            rows[name] |= summary(us) | {"calls": len(us)}
    return list(rows.values())


def _label(case: dict[str, Any]) -> str:
    return " ".join(f"{key} {value}" for key, value in case.items())


def _verdict(row: dict[str, Any]) -> str:
    return "verified" if row["verified"] else f"refused: {row.get('error', 'no reason given')}"


class _Worker:
    """Speak with one worker process, a JSON line each way."""

    def __init__(self, spec: Spec, plan: Plan) -> None:
        self.name, self.patience = spec.name, plan.patience
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nogemm.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | _environment(plan.threads),
            text=True,
        )
        self._send({"factory": spec.factory, "settings": spec.settings, "threads": plan.threads})

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message and return the answer; a dead or silent worker answers with its error."""
        if self._process.poll() is None:
            self._send(message)
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self.patience)
        line = self._process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        if not ready:
            self._process.kill()
            return {"error": f"no answer within {self.patience:.0f} s"}
        code = self._process.wait()
        return {"error": f"the worker ended with code {code}: {self._last_words()}"}

    def close(self) -> None:
        """End the worker and wait for it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker has died; the read that follows says so
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _environment(threads: int) -> dict[str, str]:
    """Return the settings every worker starts with: equal threads, and no thread that spins while it waits."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        # Inductor's own pool of compiler processes would outlive the compilation and wake up between rounds.
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
