"""What a study is to do: read from its file and checked as a whole before anything runs.

Reading order: `Study`, `Row`, `Search`, `read_study`; where the data come from is in `sources.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nogemm.config import LayerConfig
from nogemm.errors import ConfigError, NogemmError
from nogemm.layers import PACK_DTYPES
from nogemm.models.directory import model_directory
from nogemm.shape import FFNShape
from nogemm.study.kinds import KINDS, Kind, Metric, Site
from nogemm.study.reading import check_keys, check_list, check_name, multiplied, nearest, read_layer, read_yaml
from nogemm.study.search import rounded
from nogemm.study.sources import Group, Source, place, read_groups, read_model

_STUDY = (
    "kind", "title", "data", "validation", "test", "tasks", "tokenizer", "model", "preset", "common", "rows", "grid",
    "seeds", "baseline", "search", "measure", "save", "threads",
)  # fmt: skip
_ROW = ("name", "title", "model", "method", "set", "layers", "keep", "fit", "options", "search", "seeds")
_SEARCH = ("rates", "factors", "seed", "options", "extend")
_LATENCY = ("dtype", "batch", "threads", "seconds")
SEARCH_SEED, EXTEND = 100, 3


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a row's learning rate is found.

    Attributes:
        factors: on all learning rates of the row, tried in this order.
        seed: of the trials.
        options: of the kind that differ in trials, such as a smaller budget.
        extend: how often the list may go on beyond its ends, see `nogemm.study.search`.
    """

    factors: tuple[float, ...]
    seed: int
    options: Mapping[str, Any]
    extend: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: a layer, and what of the run is the row's own.

    Attributes:
        name, title: for files and for readers.
        group: of rows that are compared with each other; "" where a study has no tasks.
        source: what its runs read.
        model: that its runs begin with; None: a new one.
        layer: in the place of the FFNs; None: they stay as they are.
        layers: which FFNs are replaced, as `nogemm.convert` takes it.
        keep: numbers of the model's layers that stay; None: all.
        fit: training texts for the start in closed form; 0: none.
        options: the kind's options dataclass, all choices resolved, without a seed.
        search: None: the rates are as given.
        seeds: of the final runs.
    """

    name: str
    title: str
    group: str
    source: Source
    model: str | None
    layer: LayerConfig | None
    layers: Any
    keep: tuple[int, ...] | None
    fit: int
    options: Any
    search: Search | None
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A whole study.

    Attributes:
        name: of its file, without the ending.
        digest: sha256 of the file.
        kind: what a run is.
        metric: what runs are compared by.
        tokenizer: of all runs; None: the data's or the model's.
        baselines: {group: the row that its differences are to}; a group without one is absent.
        latency: how layers are timed; None: not at all.
        save: whether final runs keep their trained models.
        threads: of a run; None: every usable core.
    """

    name: str
    title: str
    digest: str
    kind: Kind
    metric: Metric
    tokenizer: str | None
    rows: tuple[Row, ...]
    baselines: Mapping[str, str]
    latency: Mapping[str, Any] | None
    save: bool
    threads: int | None

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds of any row, in the order of their rows."""
        return tuple(dict.fromkeys(seed for row in self.rows for seed in row.seeds))

    def row(self, name: str) -> Row:
        """Return a row by its name, or raise ConfigError with the nearest."""
        names = [row.name for row in self.rows]
        if name not in names:
            raise ConfigError(f"{self.name}: no row {name!r}; {nearest(name, names)}")
        return self.rows[names.index(name)]


def read_study(file: str | Path, data: str | Mapping[str, str] | None = None) -> Study:
    """Read a study file and check all of it: keys, rows, options, and that every layer fits the model.

    Args:
        data: in the place of the file's; of a study with tasks {task: file}.
    Raises:
        ConfigError: what is wrong, and where.
    """
    path = Path(file)
    given = check_keys(read_yaml(path), _STUDY, str(path))
    name = given.get("kind", "train")
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"{path}: unknown kind {name!r}; {nearest(str(name), list(KINDS))}")
    kind = KINDS[name]
    if not kind.tests and ("tasks" in given or "test" in given):
        raise ConfigError(f"{path}: tasks and test are for kind finetune")
    groups = read_groups(given, path, data)
    for group in groups:
        kind.check_source(group.source, f"{path}: {group.name}" if group.name else str(path))
    rows = _rows(given, kind, groups, path)
    metrics = {kind.metric(row.options): row.name for row in rows}
    if len(metrics) > 1:
        said = ", ".join(f"{row} by {metric.label}" for metric, row in metrics.items())
        raise ConfigError(f"{path}: all rows are compared by one metric, got {said}: name the metric, or use two files")
    study = Study(
        name=path.stem,
        title=str(given.get("title", path.stem)),
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        kind=kind,
        metric=next(iter(metrics)),
        tokenizer=place(given.get("tokenizer"), path, f"{path}: tokenizer"),
        rows=rows,
        baselines=_baselines(given.get("baseline"), rows, groups, path),
        latency=_latency(given.get("measure"), path),
        save=_switch(given.get("save", False), f"{path}: save"),
        threads=None if given.get("threads") is None else _whole(given["threads"], 1, f"{path}: threads"),
    )
    check_layers(study, str(path))
    return study


def _rows(given: Mapping[str, Any], kind: Kind, groups: Sequence[Group], path: Path) -> tuple[Row, ...]:
    common = check_keys(given.get("common"), kind.option_names(), f"{path}: common")
    seeds = list(_seeds(given.get("seeds", [0]), str(path)))
    shared = {name: given[name] for name in ("search", "model") if name in given} | {"seeds": seeds}
    entries: list[tuple[str, Mapping[str, Any]]] = []
    for number, entry in enumerate(check_list(given.get("rows"), f"{path}: rows"), start=1):
        entries.append((f"{path}: row {number}", check_keys(entry, _ROW, f"{path}: row {number}")))
    for number, entry in enumerate(check_list(given.get("grid"), f"{path}: grid"), start=1):
        where = f"{path}: grid {number}"
        entry = check_keys(entry, _ROW, where)
        entries += [(where, row) for row in multiplied(entry, where)]
    if not entries:
        raise ConfigError(f"{path}: a study needs rows or a grid")
    first: dict[str, str] = {}
    for where, entry in entries:
        name = check_name(entry.get("name"), where)
        if name in first:
            raise ConfigError(f"{where}: the row {name!r} stands twice; it is {first[name]} already")
        first[name] = where.rpartition(": ")[2]
    rows: list[Row] = []
    for group in groups:
        own = check_keys(group.options, kind.option_names(), f"{path}: task {group.name!r}: options")
        for where, entry in entries:
            reader = _RowReader(kind, path, given.get("preset"), group, shared, {**common, **own}, where)
            row = reader.row(entry)
            if row.name in [other.name for other in rows]:
                raise ConfigError(f"{where}: the task {group.name!r} makes a second row {row.name!r}: rename one")
            rows.append(row)
    return tuple(rows)


def row_name(group: str, name: str) -> str:
    """Return the name of a row of a task: that of its folder."""
    return f"{group}-{name}" if group else name


@dataclass(frozen=True)
class _RowReader:
    """Makes rows of one task of the entries of a study file.

    Attributes:
        shared: `search`, `model` and `seeds` of the study.
        common: options of all rows of the task.
        where: starts every message.
    """

    kind: Kind
    path: Path
    preset: Any
    group: Group
    shared: Mapping[str, Any]
    common: Mapping[str, Any]
    where: str

    def row(self, entry: Mapping[str, Any]) -> Row:
        """Make a row."""
        kind, group, name = self.kind, self.group, entry["name"]
        where = f"{self.where} {name!r}"
        choices = {**self.common, **check_keys(entry.get("options"), kind.option_names(), f"{where}: options")}
        method = entry.get("method", kind.method)
        layer = None if method is None else read_layer(method, entry.get("set"), where)
        if method is None and entry.get("set"):
            raise ConfigError(f"{where}: set belongs to a method, and the row has none")
        keep = entry.get("keep")
        if keep is not None and not (isinstance(keep, list) and all(type(n) is int for n in keep)):
            raise ConfigError(f"{where}: keep must list numbers of layers, got {keep!r}")
        if not kind.needs_model and (keep is not None or entry.get("fit") or "layers" in entry):
            raise ConfigError(f"{where}: layers, keep and fit are for kinds distil and finetune")
        model = read_model(entry.get("model", self.shared.get("model")), self.path, f"{where}: model")
        if kind.needs_model and model is None:
            raise ConfigError(f"{where}: kind {kind.name} needs a model: its directory or name")
        options = _made(kind, self.preset, choices, layer, where)
        title, search = str(entry.get("title", name)), entry.get("search", self.shared.get("search"))
        if isinstance(search, Mapping) and isinstance(self.shared.get("search"), Mapping):
            search = {**self.shared["search"], **search}
        return Row(
            name=row_name(group.name, name),
            title=f"{group.title}: {title}" if group.name else title,
            group=group.name,
            source=group.source,
            model=model,
            layer=layer,
            layers=entry.get("layers", "all"),
            keep=None if keep is None else tuple(keep),
            fit=_whole(entry.get("fit", 0), 0, f"{where}: fit"),
            options=options,
            search=_search(search, kind, options, self.preset, choices, layer, where),
            seeds=_seeds(entry.get("seeds", self.shared["seeds"]), where),
        )


def _made(kind: Kind, preset: Any, choices: Mapping[str, Any], layer: LayerConfig | None, where: str) -> Any:
    try:
        return kind.options(preset, dict(choices), layer)
    except (NogemmError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _search(
    given: Any, kind: Kind, options: Any, preset: Any, choices: dict[str, Any], layer: LayerConfig | None, where: str
) -> Search | None:
    if given is None or given is False:
        return None
    where = f"{where}: search"
    given = check_keys(given, _SEARCH, where)
    if ("rates" in given) == ("factors" in given):
        raise ConfigError(f"{where}: give rates (of lr) or factors (of all learning rates), one of the two")
    name = "rates" if "rates" in given else "factors"
    values = check_list(given[name], f"{where}: {name}")
    if not values or not all(isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in values):
        raise ConfigError(f"{where}: {name} must be positive numbers, got {values!r}")
    if name == "rates" and not hasattr(options, "lr"):
        raise ConfigError(f"{where}: {kind.name} has no rate for all: give factors")
    factors = tuple(rounded(v / options.lr if name == "rates" else v) for v in values)
    if len(set(factors)) < len(factors):
        raise ConfigError(f"{where}: {name}: a rate stands twice in {values!r}")
    changes = check_keys(given.get("options"), kind.option_names(), f"{where}: options")
    _made(kind, preset, kind.changed(choices, changes), layer, f"{where}: options")
    return Search(
        factors=factors,
        seed=_whole(given.get("seed", SEARCH_SEED), 0, f"{where}: seed"),
        options=changes,
        extend=_whole(given.get("extend", EXTEND), 0, f"{where}: extend"),
    )


def check_layers(study: Study, where: str) -> None:
    """Raise ConfigError unless every row's model is there and its layer can be built for the model's FFNs."""
    known: dict[Any, Site] = {}
    for row in study.rows:
        try:
            if study.kind.needs_model and row.model is not None:
                model_directory(row.model)
            if row.layer is None and row.keep is None:
                continue
            key = (study.kind.shape_key(row.options), row.model, row.keep)
            if key not in known:
                known[key] = study.kind.site(row.options, row.model, row.keep)
            if row.layer is not None:
                _build(row.layer.for_vocabulary(known[key].vocabulary), known[key].one_shape())
        except NogemmError as error:
            raise ConfigError(f"{where}: row {row.name!r}: {error}") from error


def _build(layer: LayerConfig, shape: FFNShape) -> None:
    try:
        with torch.device("meta"):
            layer.make(shape)
    except RuntimeError as error:
        if isinstance(error, NogemmError):
            raise
        layer.make(shape)  # its start is drawn by a generator of its own, which the meta device has not


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    seeds = [_whole(seed, 0, f"{where}: seeds") for seed in check_list(given, f"{where}: seeds")]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}: seeds must be different whole numbers, at least one, got {given!r}")
    return tuple(seeds)


def _baselines(given: Any, rows: Sequence[Row], groups: Sequence[Group], path: Path) -> dict[str, str]:
    """Return {group: its baseline}: the row of that name in every group, by default "dense" where there is one."""
    names = [row.name for row in rows]
    own = [row.name.removeprefix(row_name(groups[0].name, "")) for row in rows if row.group == groups[0].name]
    if given is not None and given not in own:
        raise ConfigError(f"{path}: baseline {given!r} is no row; {nearest(str(given), own)}")
    found = {group.name: row_name(group.name, str(given or "dense")) for group in groups}
    return {group: name for group, name in found.items() if name in names}


def _latency(given: Any, path: Path) -> Mapping[str, Any] | None:
    measure = check_keys(given, ("latency",), f"{path}: measure")
    if measure.get("latency") in (None, False):
        return None
    where = f"{path}: measure: latency"
    chosen = check_keys({} if measure["latency"] is True else measure["latency"], _LATENCY, where)
    found = {"dtype": "int8", "batch": [1, 64], "threads": 0, "seconds": 0.05} | chosen
    if found["dtype"] not in PACK_DTYPES:
        raise ConfigError(f"{where}: dtype must be one of {', '.join(PACK_DTYPES)}, got {found['dtype']!r}")
    batches = [_whole(batch, 1, f"{where}: batch") for batch in check_list(found["batch"], f"{where}: batch")]
    if not batches:
        raise ConfigError(f"{where}: batch is empty")
    _whole(found["threads"], 0, f"{where}: threads")
    return found


def _switch(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false, got {value!r}")
    return value


def _whole(value: Any, low: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{where} must be a whole number of at least {low}, got {value!r}")
    return value
