"""Run a study: every search and every seed that has no result yet, each in a process of its own.

Reading order: `study`, `Runner.go`, `Runner.result`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nogemm.bench.layer import LayerBenchArgs, run_layer_bench
from nogemm.bench.report.runs import read_runs
from nogemm.errors import ConfigError, NogemmError
from nogemm.hardware.cpu import machine, machine_line
from nogemm.running.partial import sigterm_interrupts
from nogemm.study.errors import StudyError, StudyInterrupted
from nogemm.study.listing import Expected, duration
from nogemm.study.plan import Row, Study, read_study
from nogemm.study.process import Stopped, clear, run_process
from nogemm.study.search import Choice, choose, next_rate
from nogemm.study.store import DONE, FAILED, LATENCY, RUN, Store, Task, plain
from nogemm.study.timed import words_of
from nogemm.train.checkpoint import Lock
from nogemm.train.errors import TrainingError
from nogemm.version import __version__

Note = Callable[[str], None]
ALL = "all"


@dataclass(frozen=True)
class StudyReport:
    """What stands in a study's folder.

    Attributes:
        folder: of the study.
        done, failed, left: final runs with a result, with an error, and without either.
        stopped: why the call ended before all runs: "" or "time".
        table: means over seeds with intervals, as `nogemm report` shows them.
    """

    folder: Path
    done: int
    failed: int
    left: int
    stopped: str
    table: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON values, with the counts."""
        counts = {"done": self.done, "failed": self.failed, "left": self.left, "stopped": self.stopped}
        return self.table | {"runs": counts}


def study(
    file: str | Path,
    folder: str | Path | None = None,
    *,
    data: str | Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
    redo: Sequence[str] = (),
    retry: bool = False,
    max_seconds: float | None = None,
    note: Note | None = None,
) -> StudyReport:
    """Run what a study file describes and is not done yet; every run has a process and a result file of its own.

    The whole file is checked before the first run. A run that has a result is not made again. One that was interrupted
    goes on from its checkpoint. One that fails is a row with its error, and the study goes on.

    Args:
        file: YAML; docs/guides/study.md lists its keys.
        folder: for results; None: runs/NAME, with the file's name.
        data: text to train on, in the place of the file's; of a study with tasks {task: file}.
        only: names of rows; the others are left as they are.
        redo: names of rows whose results are deleted first; "all" for every row.
        retry: make runs again that have failed.
        max_seconds: stop then; the run that is going on saves its state.
        note: gets a line about what is going on.
    Returns:
        counts of runs, and the table.
    Raises:
        ConfigError: the file is wrong; the message says where. DataError: the data cannot be read.
        StudyError: the folder holds results of other choices or of another study, another process is at it, or the
            disk is full.
        StudyInterrupted: Ctrl-C or SIGTERM; the run's state was saved, and the same call goes on.
    Example:
        >>> report = nogemm.study("benchmarks/studies/smoke.yaml", "runs/smoke")  # doctest: +SKIP
    """
    end = None if max_seconds is None else time.monotonic() + max_seconds
    plan = read_study(file, data)
    wanted = [plan.row(name) for name in only] if only is not None else list(plan.rows)
    anew = list(plan.rows) if ALL in redo else [plan.row(name) for name in redo]
    store = Store(plan, Path(folder) if folder is not None else Path("runs") / plan.name)
    try:
        with sigterm_interrupts(), _held(store.folder):
            store.check_name()
            for row in plan.rows:  # before anything is deleted
                if row not in anew:
                    store.check(row)
            for row in anew:
                store.forget(row)
            store.begin()
            runner = Runner(store, wanted, retry, end, note or (lambda line: None))
            stopped = runner.go()
    except KeyboardInterrupt as error:
        raise StudyInterrupted(
            f"the study was stopped; its results so far are in {store.folder}. The same command goes on where it was"
        ) from error
    return report_of(store, stopped)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Keep a second study out of the folder."""
    lock = Lock(folder)
    try:
        lock.__enter__()
    except TrainingError as error:
        taken = isinstance(error.__cause__, BlockingIOError)
        why = f"another study is going on in {folder}" if taken else f"{folder} cannot be written: {error.__cause__}"
        raise StudyError(why) from error
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def report_of(store: Store, stopped: str = "") -> StudyReport:
    """Count what stands in a study's folder."""
    found = [store.final(row, seed).file.is_file() for row in store.study.rows for seed in row.seeds]
    table = read_runs(store.folder)
    failed = sum(len(row["errors"]) for row in table["rows"])
    return StudyReport(store.folder, sum(found) - failed, failed, len(found) - sum(found), stopped, table)


class Runner:
    """Searches first, then seed by seed, so that a study that ends early compares all rows."""

    def __init__(self, store: Store, rows: Sequence[Row], retry: bool, end: float | None, note: Note) -> None:
        self.store, self.rows, self.retry, self.end, self.note = store, rows, retry, end, note
        self.expected = Expected(store)
        self.choices: dict[str, Choice | None] = {}

    @property
    def study(self) -> Study:
        """What is run."""
        return self.store.study

    def go(self) -> str:
        """Make every run that is left; return why it ended early, or ""."""
        try:
            for row in self.rows:
                if any(self._todo(self.store.final(row, seed)) for seed in row.seeds):
                    self.choices[row.name] = self.search(row)
            for seed in self.study.seeds:
                for row in self.rows:
                    if seed in row.seeds:
                        self._final(row, seed)
            if self.study.latency is not None:
                for row in self.rows:
                    self._latency(row, self.study.latency)
        except Stopped:
            return "time"
        return ""

    def search(self, row: Row) -> Choice | None:
        """Try rates until one is chosen; None: every trial failed."""
        if row.search is None:
            return Choice(1.0, False)
        lower = self.study.metric.lower
        trials: dict[float, float | None] = {}
        while (factor := next_rate(trials, row.search.factors, row.search.extend, lower)) is not None:
            result = self.result(self.store.trial(row, factor))
            trials[factor] = result["value"] if result["status"] == DONE else None
        return choose(trials, lower)

    def _final(self, row: Row, seed: int) -> None:
        if row.name not in self.choices:
            return
        choice = self.choices[row.name]
        task = self.store.final(row, seed, 1.0 if choice is None else choice.rate)
        if choice is None and self._todo(task):
            self._write(
                task, {"status": FAILED, "error": "no rate of its search could be trained; see its trials"}, None
            )
        elif choice is not None:
            found = self.result(task, choice)
            if found["status"] == DONE and found["factor"] != task.factor:
                raise StudyError(
                    f"{task.file} was made at other rates than the search for {row.name!r} chooses now (factor "
                    f"{found['factor']:g}, now {task.factor:g}): run the row anew (--redo {row.name})"
                )

    def _todo(self, task: Task) -> bool:
        found = self.store.read(task)
        return found is None or (self.retry and found["status"] == FAILED)

    def result(self, task: Task, choice: Choice | None = None) -> dict[str, Any]:
        """Return a run's result: that of its file, else that of a process.

        Raises:
            Stopped: the time is up.
        """
        if not self._todo(task):
            found = self.store.read(task)
            assert found is not None
            return found
        if self._expired():
            raise Stopped
        head = f"{task.label}, {self.expected.left(self.rows)}"
        self.note(head)
        begun = time.monotonic()
        outcome = run_process(
            self.store.job(task), self.study.threads, lambda line: self.note(f"{head}: {line}"), self._expired
        )
        found = self._write(task, outcome, choice)
        clear(task.work)
        value = f"{self.study.metric.label} {found['value']:.4f}" if found["status"] == DONE else found["error"]
        self.note(f"{task.label}: {value} ({duration(time.monotonic() - begun)})")
        return found

    def _expired(self) -> bool:
        return self.end is not None and time.monotonic() >= self.end

    def _write(self, task: Task, outcome: dict[str, Any], choice: Choice | None) -> dict[str, Any]:
        """Write a run's result, and return it."""
        study, row, metric = self.study, task.row, self.study.metric
        figures, report = outcome.get("figures"), dict(outcome.get("report") or {})
        value = None if figures is None else figures.get(metric.name)
        if outcome["status"] == DONE and value is None:
            outcome = {"status": FAILED, "error": f"the {metric.label} is not a finite number"}
        facts = report.pop("machine", None) or machine() | {"line": machine_line()}
        found = {
            "kind": RUN,
            "study": study.name,
            "row": row.name,
            "title": row.title,
            "seed": task.seed,
            "trial": task.trial,
            "factor": task.factor,
            "lr": getattr(task.options, "lr", None),
            "at_edge": choice is not None and choice.at_edge,
            "status": outcome["status"],
            "error": outcome.get("error"),
            "value": value if outcome["status"] == DONE else None,
            "figures": figures,
            "key": self.store.key(task),
            "file_sha256": study.digest,
            "date": time.strftime("%Y-%m-%d"),
            "nogemm": __version__,
            "threads": study.threads,
            "machine": facts,
            "report": report or None,
        }
        self.store.write(task.file, found)
        return found

    def _latency(self, row: Row, wanted: Any) -> None:
        """Time a row's layer alone, with random weights, unless that was done for this layer in this way."""
        file = self.store.folder / row.name / "latency.json"
        if row.layer is None:
            return
        shape = self.study.kind.site(row.options, row.model, row.keep).one_shape()
        method, words = words_of(row.layer)
        args = LayerBenchArgs(
            method=method, set=words, d=shape.d_in, hidden=shape.hidden or 0, activation=shape.activation,
            gated=shape.gated, dtype=wanted["dtype"], batch=tuple(wanted["batch"]), against=(),
            threads=wanted["threads"], seconds=wanted["seconds"], pool_cap_bytes=1 << 26,
        )  # fmt: skip
        head = {"kind": LATENCY, "study": self.study.name, "row": row.name, "settings": plain(wanted)}
        head["layer"] = row.layer.to_dict() | {"d": shape.d_in}
        if _timed(file, plain(head)):
            return
        if self._expired():
            raise Stopped
        self.note(f"{row.name}: timing its layer")
        try:
            if shape.d_in != shape.d_out:
                raise ConfigError("its output is not as wide as its input")
            found: dict[str, Any] = {"rows": run_layer_bench(args)["rows"], "error": None}
        except (NogemmError, ValueError) as error:
            found = {"rows": [], "error": str(error)}
        self.store.write(file, head | found | {"machine": machine() | {"line": machine_line()}})


def _timed(file: Path, head: dict[str, Any]) -> bool:
    """Say whether a file holds the times of this layer, taken in this way."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(before, dict) and all(before.get(name) == value for name, value in head.items())
