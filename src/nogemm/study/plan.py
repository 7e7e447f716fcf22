"""What a study is to do: read from its file and checked as a whole before anything runs.

Reading order: `Study`, `Row`, `Search`, `read_study`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nogemm.config import LayerConfig
from nogemm.errors import ConfigError, NogemmError
from nogemm.layers import PACK_DTYPES
from nogemm.shape import FFNShape
from nogemm.study.kinds import KINDS, Kind
from nogemm.study.reading import check_keys, check_list, check_name, multiplied, nearest, read_layer, read_yaml
from nogemm.study.search import rounded
from nogemm.train.lm.corpus import is_hub_name, is_sample
from nogemm.train.sources import SPLITS

_STUDY = (
    "kind", "title", "data", "validation", "tokenizer", "model", "preset", "common", "rows", "grid", "seeds",
    "baseline", "search", "measure", "save", "threads",
)  # fmt: skip
_ROW = ("name", "title", "method", "set", "layers", "keep", "fit", "options", "search", "seeds")
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
        layer: in the place of the FFNs; None: they stay as they are.
        layers: which FFNs are replaced, as `nogemm.convert` takes it.
        keep: numbers of the model's layers that stay; None: all.
        fit: training texts for the start in closed form (kind "distil"); 0: none.
        options: the kind's options dataclass, all choices resolved, without a seed.
        search: None: the rates are as given.
        seeds: of the final runs.
    """

    name: str
    title: str
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
        data, validation, split, tokenizer, model: shared by all runs; `split` of the validation rows.
        baseline: the row that differences are to; None: none.
        latency: how layers are timed; None: not at all.
        save: whether final runs keep their trained models.
        threads: of a run; None: every usable core.
    """

    name: str
    title: str
    digest: str
    kind: Kind
    data: str
    validation: str | None
    split: str | None
    tokenizer: str | None
    model: str | None
    rows: tuple[Row, ...]
    baseline: str | None
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


def read_study(file: str | Path, data: str | None = None) -> Study:
    """Read a study file and check all of it: keys, rows, options, and that every layer fits the model.

    Args:
        data: in the place of the file's.
    Raises:
        ConfigError: what is wrong, and where.
    """
    path = Path(file)
    given = check_keys(read_yaml(path), _STUDY, str(path))
    name = given.get("kind", "train")
    if name not in KINDS:
        raise ConfigError(f"{path}: unknown kind {name!r}; {nearest(str(name), list(KINDS))}")
    kind = KINDS[name]
    validation, split = _validation(given.get("validation"), path)
    places = {key: _place(given.get(key), path, key) for key in ("tokenizer", "model")}
    if kind.needs_model and places["model"] is None:
        raise ConfigError(f"{path}: kind {name} needs a model: the dense teacher's directory or name")
    rows = _rows(given, kind, path)
    study = Study(
        name=path.stem,
        title=str(given.get("title", path.stem)),
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        kind=kind,
        data=data or _place(given.get("data", "sample"), path, "data") or "sample",
        validation=validation,
        split=split,
        rows=rows,
        baseline=_baseline(given.get("baseline"), rows, path),
        latency=_latency(given.get("measure"), path),
        save=_switch(given.get("save", False), f"{path}: save"),
        threads=None if given.get("threads") is None else _whole(given["threads"], 1, f"{path}: threads"),
        **places,
    )
    for what, source in (("data", study.data), ("validation", study.validation)):
        if source is not None and not is_sample(source) and not is_hub_name(source) and not Path(source).is_file():
            raise ConfigError(f"{path}: {what}: no such file: {source}")
    check_layers(study, str(path))
    return study


def _rows(given: Mapping[str, Any], kind: Kind, path: Path) -> tuple[Row, ...]:
    common = check_keys(given.get("common"), kind.option_names(), f"{path}: common")
    search, seeds = given.get("search"), _seeds(given.get("seeds", [0]), str(path))
    entries: list[tuple[str, Mapping[str, Any]]] = []
    for number, entry in enumerate(check_list(given.get("rows"), f"{path}: rows"), start=1):
        entries.append((f"{path}: row {number}", check_keys(entry, _ROW, f"{path}: row {number}")))
    for number, entry in enumerate(check_list(given.get("grid"), f"{path}: grid"), start=1):
        where = f"{path}: grid {number}"
        entry = check_keys(entry, _ROW, where)
        entries += [(where, row) for row in multiplied(entry, where)]
    if not entries:
        raise ConfigError(f"{path}: a study needs rows or a grid")
    rows: list[Row] = []
    first: dict[str, str] = {}
    for where, entry in entries:
        name = check_name(entry.get("name"), where)
        if name in first:
            raise ConfigError(f"{where}: the row {name!r} stands twice; it is {first[name]} already")
        first[name] = where.rpartition(": ")[2]
        rows.append(
            _row({"seeds": list(seeds), **entry}, common, search, given.get("preset"), kind, f"{where} {name!r}")
        )
    return tuple(rows)


def _row(entry: Mapping[str, Any], common: Mapping[str, Any], search: Any, preset: Any, kind: Kind, where: str) -> Row:
    own = check_keys(entry.get("options"), kind.option_names(), f"{where}: options")
    method = entry.get("method", "dense")
    layer = None if method is None else read_layer(method, entry.get("set"), where)
    keep = entry.get("keep")
    if keep is not None and not (isinstance(keep, list) and all(type(n) is int for n in keep)):
        raise ConfigError(f"{where}: keep must list numbers of layers, got {keep!r}")
    if not kind.needs_model and (keep is not None or entry.get("fit") or "layers" in entry):
        raise ConfigError(f"{where}: layers, keep and fit are for kind distil")
    options = _made(kind, preset, {**common, **own}, layer, where)
    row_search = entry.get("search", search)
    if isinstance(row_search, Mapping) and isinstance(search, Mapping):
        row_search = {**search, **row_search}
    return Row(
        name=entry["name"],
        title=str(entry.get("title", entry["name"])),
        layer=layer,
        layers=entry.get("layers", "all"),
        keep=None if keep is None else tuple(keep),
        fit=_whole(entry.get("fit", 0), 0, f"{where}: fit"),
        options=options,
        search=_search(row_search, kind, options, preset, {**common, **own}, layer, where),
        seeds=_seeds(entry["seeds"], where),
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
    """Raise ConfigError unless every row's layer can be built for the model's FFNs."""
    known: dict[Any, FFNShape] = {}
    for row in study.rows:
        if row.layer is None:
            continue
        key = study.kind.shape_key(row.options)
        try:
            if key not in known:
                known[key] = study.kind.shape(row.options, study.model)
            _build(row.layer.for_vocabulary(study.kind.vocabulary(row.options)), known[key])
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


def _validation(given: Any, path: Path) -> tuple[str | None, str | None]:
    if not isinstance(given, Mapping):
        return _place(given, path, "validation"), None
    given = check_keys(given, ("data", "split"), f"{path}: validation")
    split = given.get("split")
    if split not in (None, *SPLITS):
        raise ConfigError(f"{path}: validation: split must be one of {', '.join(SPLITS)}, got {split!r}")
    return _place(given.get("data"), path, "validation: data"), split


def _place(given: Any, path: Path, what: str) -> str | None:
    """Return a file or a name: from where the command runs, else beside the study file, else as it is."""
    if given is None:
        return None
    if not isinstance(given, str) or not given:
        raise ConfigError(f"{path}: {what} must be a file or a name, got {given!r}")
    beside = path.parent / given
    return str(beside) if not Path(given).exists() and beside.exists() else given


def _seeds(given: Any, where: str) -> tuple[int, ...]:
    seeds = [_whole(seed, 0, f"{where}: seeds") for seed in check_list(given, f"{where}: seeds")]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{where}: seeds must be different whole numbers, at least one, got {given!r}")
    return tuple(seeds)


def _baseline(given: Any, rows: tuple[Row, ...], path: Path) -> str | None:
    names = [row.name for row in rows]
    if given is None:
        return "dense" if "dense" in names else None
    if given not in names:
        raise ConfigError(f"{path}: baseline {given!r} is no row; {nearest(str(given), names)}")
    return str(given)


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
