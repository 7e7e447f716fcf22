"""The folder of a study: a JSON for each run, what each was made from, and whether that is still what is asked for.

    FOLDER/study.json             the rows, the seeds, the baseline
    FOLDER/ROW/rate-0.001.json    a trial of the search for ROW's learning rate (factor-2.json where it has several)
    FOLDER/ROW/seed-0.json        a final run
    FOLDER/ROW/latency.json       the layer's time, where it is measured
    FOLDER/work                   tokens, logs, checkpoints, models; nothing of it is part of the results

Reading order: `Task`, `Store`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nogemm.files import parse_json, write_json
from nogemm.models.directory import find_directory
from nogemm.study.errors import StudyError
from nogemm.study.kinds import Job
from nogemm.study.plan import Row, Study
from nogemm.study.reading import flattened
from nogemm.study.search import next_rate
from nogemm.study.sources import WORK, kept_model
from nogemm.train.identity import file_identity, model_identity
from nogemm.train.reader import SAMPLE, sample_file

STUDY, RUN, LATENCY = "study-runs", "study-run", "study-latency"
DONE, FAILED = "done", "failed"
_MOST = 4  # differences that a message names


@dataclass(frozen=True)
class Task:
    """One run of a row: a trial at a factor of its rates, or a final run of a seed at the chosen factor."""

    row: Row
    seed: int
    factor: float
    trial: bool
    options: Any
    """The kind's options of this very run."""
    file: Path
    work: Path

    @property
    def label(self) -> str:
        """Name the run for a reader."""
        return f"{self.row.name} {self.file.stem.replace('-', ' ', 1)}"


class Store:
    """Paths, keys and results of a study in its folder."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.work = folder / WORK

    # -- runs

    def final(self, row: Row, seed: int, factor: float = 1.0) -> Task:
        """Describe the final run of a seed."""
        options = replace(self.study.kind.scaled(row.options, factor), seed=seed)
        return self._task(row, seed, factor, False, options, f"seed-{seed}")

    def trial(self, row: Row, factor: float) -> Task:
        """Describe the trial of a factor."""
        assert row.search is not None
        kind, search = self.study.kind, row.search
        given = {name: getattr(row.options, name) for name in kind.option_names()}
        changed = kind.changed(given, dict(search.options))
        options = replace(row.options, **dict.fromkeys(given.keys() - changed.keys()), **search.options)
        options = replace(kind.scaled(options, factor), seed=search.seed)
        rate = getattr(row.options, "lr", None)
        name = f"factor-{factor:g}" if rate is None else f"rate-{factor * rate:.6g}"
        return self._task(row, search.seed, factor, True, options, name)

    def _task(self, row: Row, seed: int, factor: float, trial: bool, options: Any, name: str) -> Task:
        return Task(
            row, seed, factor, trial, options, self.folder / row.name / f"{name}.json", self.work / row.name / name
        )

    def job(self, task: Task) -> Job:
        """Return what the process of a run needs to know."""
        study, row = self.study, task.row
        return Job(
            kind=study.kind.name,
            trial=task.trial,
            options=plain(task.options.to_dict()),
            layer=None if row.layer is None else row.layer.to_dict(),
            layers=row.layers,
            keep=None if row.keep is None else list(row.keep),
            fit=row.fit,
            data=row.source.data,
            validation=row.source.validation,
            split=row.source.split,
            test=row.source.test,
            tokenizer=study.tokenizer,
            model=row.model,
            folder=str(task.work),
            shared=str(self.work / "shared"),
            save=str(kept_model(self.work, row.name, task.seed)) if study.save and not task.trial else None,
        )

    def key(self, task: Task) -> dict[str, Any]:
        """Return what a result depends on, as JSON values; two that are equal need no second run."""
        study, row, search, source = self.study, task.row, task.row.search, task.row.source
        free = {*study.kind.free, "ffn", "seed"}
        base = task.options if task.trial else row.options
        options = {name: value for name, value in base.to_dict().items() if name not in free}
        found = {
            "kind": study.kind.name,
            "layer": None if row.layer is None else row.layer.to_dict(),
            "layers": row.layers,
            "keep": row.keep,
            "fit": row.fit,
            "options": options,
            "seed": task.seed,
            "data": identity(source.data),
            "validation": None if source.validation is None else identity(source.validation) | {"split": source.split},
            "tokenizer": None if study.tokenizer is None else folder_identity(study.tokenizer),
            "model": None if row.model is None else folder_identity(row.model),
        }
        if source.test is not None:
            found["test"] = identity(source.test)
        if not task.trial:
            found["search"] = None if search is None else {
                "factors": search.factors, "seed": search.seed, "options": dict(search.options),
                "extend": search.extend,
            }  # fmt: skip
        return plain(found)

    # -- results

    def read(self, task: Task) -> dict[str, Any] | None:
        """Return the result of a run; None: there is none.

        Raises:
            StudyError: it is damaged, or of other choices than the study's file makes now.
        """
        found = read_result(task.file)
        if found is None:
            return None
        different = differences(found["key"], known_of(found["key"], self.key(task)))
        if different:
            more = f" and {len(different) - _MOST} more" if len(different) > _MOST else ""
            raise StudyError(
                f"{self.study.name}: the row {task.row.name!r} has changed since {task.file} was recorded: "
                f"{'; '.join(different[:_MOST])}{more}. Write to another folder (--output), or run the row anew "
                f"(--redo {task.row.name}), which deletes its results"
            )
        return found

    def check_name(self) -> None:
        """Raise StudyError if the folder holds the results of another study."""
        study = self.study
        try:
            before = parse_json((self.folder / "study.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        names = {"study": study.name, "of": study.kind.name}
        if any(before.get(name) != value for name, value in names.items()):
            raise StudyError(
                f"{self.folder} holds the results of another study, {before.get('study')!r} of kind "
                f"{before.get('of')!r}: write to another folder (--output)"
            )

    def check(self, row: Row) -> None:
        """Raise StudyError if a result of a row, trial or final, was made from other choices than the file's."""
        for seed in row.seeds:
            self.read(self.final(row, seed))
        self.trials(row)

    def trials(self, row: Row) -> tuple[dict[float, float | None], Task | None]:
        """Return what the trials of a row came to so far, and the next one to make; None: its search has ended.

        A trial that failed has no value. Raises StudyError as `read` does.
        """
        found: dict[float, float | None] = {}
        if row.search is None:
            return found, None
        lower = self.study.metric.lower
        while (factor := next_rate(found, row.search.factors, row.search.extend, lower)) is not None:
            task = self.trial(row, factor)
            result = self.read(task)
            if result is None:
                return found, task
            found[factor] = result["value"] if result["status"] == DONE else None
        return found, None

    def begin(self) -> None:
        """Write down which rows there are, for the report."""
        study, metric = self.study, self.study.metric
        self.write(
            self.folder / "study.json",
            {
                "kind": STUDY,
                "study": study.name,
                "title": study.title,
                "of": study.kind.name,
                "file_sha256": study.digest,
                "metric": {"name": metric.name, "label": metric.label, "lower": metric.lower},
                "rows": [
                    {
                        "name": row.name, "title": row.title, "group": row.group,
                        "baseline": study.baselines.get(row.group), "layer": layer_of(row), "seeds": list(row.seeds),
                    }
                    for row in study.rows
                ],
            },
        )  # fmt: skip

    def write(self, file: Path, value: Any) -> None:
        """Write a file of the results; StudyError where it cannot be written."""
        try:
            write_json(file, value)
        except OSError as error:
            raise StudyError(
                f"{file} cannot be written: {error}. Make room, and call the study again to go on"
            ) from error

    def forget(self, row: Row) -> None:
        """Delete all results of a row, and what it left in the work folder."""
        shutil.rmtree(self.folder / row.name, ignore_errors=True)
        shutil.rmtree(self.work / row.name, ignore_errors=True)


def layer_of(row: Row) -> dict[str, Any] | None:
    """Return a row's layer as JSON values."""
    return None if row.layer is None else row.layer.to_dict()


def read_result(file: Path) -> dict[str, Any] | None:
    """Return what a run's file holds; None: there is no file.

    Raises:
        StudyError: it is no result.
    """
    if not file.is_file():
        return None
    try:
        found = parse_json(file.read_text(encoding="utf-8"))
        ok = found["kind"] == RUN and found["status"] in (DONE, FAILED) and isinstance(found["key"], dict)
    except (ValueError, KeyError, TypeError):
        ok = False
    if not ok:
        raise StudyError(f"{file} is no result of a study: delete it, and its run is made anew")
    return found


@functools.cache
def identity(data: str) -> dict[str, Any]:
    """Return the name of a source, without its folder, and what tells its content from other content."""
    if data == SAMPLE:
        with sample_file() as path:
            return {"name": data, **file_identity(path)}
    path = Path(data)
    return {"name": path.name, **file_identity(path)} if path.is_file() else {"name": data}


@functools.cache
def folder_identity(model: str) -> dict[str, Any]:
    """Return the name of a model, without its folder, and a hash of its files."""
    path = Path(model)
    if path.is_file() or find_directory(model) is None:  # a config, or a name that a run will say is nowhere
        return identity(model)
    digest = hashlib.sha256(json.dumps(model_identity(model), sort_keys=True).encode())
    return {"name": path.name, "sha256": digest.hexdigest()}


def known_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return a key without what an older result does not tell: it holds the name of a model alone."""
    older = [name for name in ("model", "tokenizer") if isinstance(before.get(name), str) and now.get(name)]
    return {**now, **{name: now[name]["name"] for name in older}}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List what differs, as "name: before, now after"."""
    old, new = dict(flattened(before)), dict(flattened(now))
    return [
        f"{name}: {old.get(name, 'nothing')}, now {new.get(name, 'nothing')}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def plain(value: Any) -> Any:
    """Return a value as JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(value))
