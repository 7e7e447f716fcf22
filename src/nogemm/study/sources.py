"""Where the rows of a study come from: the data, what chooses and tests, and the tasks of a study that has several.

Reading order: `Source`, `Group`, `read_groups`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nogemm.errors import ConfigError
from nogemm.study.reading import check_keys, check_list, check_name, nearest
from nogemm.train.reader import SAMPLE
from nogemm.train.sources import SPLITS, is_hub_name

WORK, MODEL = "work", "model"
_TASK = ("name", "title", "data", "validation", "test", "options")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a run reads.

    Attributes:
        data: a file or a name.
        validation: other texts or rows to choose by; None: as the kind does without.
        split: of the file `validation` that counts; None: as the kind reads it.
        test: other rows to test on, of kind "finetune"; None: those of the data, if it has any.
    """

    data: str
    validation: str | None = None
    split: str | None = None
    test: str | None = None


@dataclass(frozen=True, kw_only=True)
class Group:
    """Rows that are compared with each other: those of one task; without tasks, all rows of a study.

    Attributes:
        name, title: of the task; "" without tasks.
        source: what its runs read.
        options: of the kind, that all its rows have.
    """

    source: Source
    name: str = ""
    title: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def read_groups(given: Mapping[str, Any], path: Path, data: str | Mapping[str, str] | None) -> list[Group]:
    """Read the sources of a study file: its `data`, `validation` and `test`, or those of each of its `tasks`.

    Args:
        given: the whole file.
        data: in the place of the file's; of a study with tasks {task: file}.
    Raises:
        ConfigError: unknown keys, a task that stands twice, or a file that is not there.
    """
    tasks = check_list(given.get("tasks"), f"{path}: tasks")
    if not tasks:
        if isinstance(data, Mapping):
            raise ConfigError(f"{path}: has no tasks, so data is one file, got {dict(data)!r}")
        return [Group(source=_source(given, path, str(path), data))]
    doubled = [name for name in ("data", "validation", "test") if name in given]
    if doubled:
        raise ConfigError(f"{path}: {', '.join(doubled)} belong to each of the tasks, where a study has tasks")
    groups: list[Group] = []
    others = data if isinstance(data, Mapping) else {}
    for number, entry in enumerate(tasks, start=1):
        where = f"{path}: task {number}"
        entry = check_keys(entry, _TASK, where)
        name = check_name(entry.get("name"), where)
        if name in [group.name for group in groups]:
            raise ConfigError(f"{where}: the task {name!r} stands twice")
        options = check_keys(entry.get("options"), (entry.get("options") or {}), f"{where} {name!r}: options")
        source = _source(entry, path, f"{where} {name!r}", others.get(name))
        groups.append(Group(source=source, name=name, title=str(entry.get("title", name)), options=options))
    names = [group.name for group in groups]
    if isinstance(data, str):
        raise ConfigError(f"{path}: has the tasks {', '.join(names)}: name the one that {data} is for, as TASK={data}")
    for name in others:
        if name not in names:
            raise ConfigError(f"{path}: no task {name!r}; {nearest(name, names)}")
    return groups


def _source(given: Mapping[str, Any], path: Path, where: str, data: str | None) -> Source:
    validation, split = _validation(given.get("validation"), path, where)
    found = Source(
        data=data or place(given.get("data", SAMPLE), path, f"{where}: data") or SAMPLE,
        validation=validation,
        split=split,
        test=place(given.get("test"), path, f"{where}: test"),
    )
    for what in ("data", "validation", "test"):
        file = getattr(found, what)
        if file is not None and file != SAMPLE and not is_hub_name(file) and not Path(file).is_file():
            raise ConfigError(f"{where}: {what}: no such file: {file}")
    return found


def _validation(given: Any, path: Path, where: str) -> tuple[str | None, str | None]:
    where = f"{where}: validation"
    if not isinstance(given, Mapping):
        return place(given, path, where), None
    given = check_keys(given, ("data", "split"), where)
    split = given.get("split")
    if split not in (None, *SPLITS):
        raise ConfigError(f"{where}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    if given.get("data") is None:
        raise ConfigError(f"{where}: names no data")
    return place(given["data"], path, f"{where}: data"), split


def place(given: Any, path: Path, where: str) -> str | None:
    """Return a file or a name of a study file: from where the command runs, else beside the file, else as it is."""
    if given is None:
        return None
    if not isinstance(given, str) or not given:
        raise ConfigError(f"{where} must be a file or a name, got {given!r}")
    beside = path.parent / given
    return str(beside) if not Path(given).exists() and beside.exists() else given


def read_model(given: Any, path: Path, where: str) -> str | None:
    """Return the model of a row: a directory or a name, or one that a study with `save: true` has kept.

    Args:
        given: None, a word, or {"study": its folder, "row": name, "seed": 0 by default}.
    """
    if not isinstance(given, Mapping):
        return place(given, path, where)
    given = check_keys(given, ("study", "row", "seed"), where)
    folder, row, seed = place(given.get("study"), path, f"{where}: study"), given.get("row"), given.get("seed", 0)
    if folder is None or not isinstance(row, str) or isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"{where}: a kept model has a study, a row and a seed, got {dict(given)!r}")
    return str(kept_model(Path(folder) / WORK, check_name(row, where), seed))


def kept_model(work: Path, row: str, seed: int) -> Path:
    """Return where the model of a final run lies, below a study's folder of work."""
    return work / row / f"seed-{seed}" / MODEL
