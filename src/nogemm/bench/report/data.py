"""Read result files into the rows that the report draws.

A result is a JSON object. `kind` says what it holds: "layer", "model" and "train-step" (timings), "quality" (scores of
embeddings), "study" (recorded rows of a long run), "demo" (all of them), "methods", "projections" and "lsh" (a
table each), "profile", "sparsity", "study-table", "tune". A file without a kind is told by its rows. A folder is that
of a `nogemm study`, whose table is made from its runs (`runs.py`). Nothing else computes: every figure stands in a
file. Reading order: rows, `Results`, `read_results`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nogemm.bench.engine.result import shown_name, why_not
from nogemm.bench.report.runs import KIND as STUDY_TABLE
from nogemm.bench.report.runs import read_runs
from nogemm.bench.report.tables import (
    TextTable,
    distributed_table,
    flips_table,
    head_table,
    hire_recall_table,
    lsh_table,
    methods_table,
    operator_table,
    projections_table,
    serve_table,
    table5_table,
    topk_table,
)
from nogemm.bench.report.tune import NEEDED
from nogemm.errors import ConfigError
from nogemm.files import parse_json

UNFIT = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError)
"""What reading or drawing a result raises that lacks a field, or has something else in it than was to be expected."""
METRICS = {
    "mrr_at_10": "MRR@10",
    "recall_at_10": "recall@10",
    "agreement": "agreement",
    "old_index_mrr_at_10": "MRR@10, old index",
    "kept": "MRR@10 kept",
    "mlm_loss": "MLM loss",
    "accuracy": "accuracy",
}


@dataclass(frozen=True, kw_only=True)
class Score:
    """One figure with its 95 % interval; the interval is absent where a file gives none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """What one model scores and what its FFNs cost; `recorded` rows come from an earlier, longer run."""

    name: str
    scores: Mapping[str, Score]
    ours: bool = False
    recorded: bool = False
    flops: float | None = None
    bytes_read: float | None = None
    parameters: int | None = None
    file_bytes: int | None = None
    peak_bytes: int | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """One timing: `shape` names the layer or the model, `size` the batch in tokens or (sequences, length).

    `us` and its percentiles are None for a contender that could not run; `why_not` then says why.
    """

    shape: str
    contender: str
    ours: bool
    size: tuple[int, ...]
    us: float | None
    us_p10: float | None
    us_p90: float | None
    ratio: float | None
    setting: str
    why_not: str
    detail: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One replaced FFN."""

    name: str
    config: str
    fitted: str
    parameters_before: int
    parameters_after: int
    flops_before: float
    flops_after: float


@dataclass
class Results:
    """Everything read, in the order of the files."""

    titles: list[str] = field(default_factory=list)
    machines: list[str] = field(default_factory=list)
    quality: list[QualityRow] = field(default_factory=list)
    layers: list[SpeedRow] = field(default_factory=list)
    models: list[SpeedRow] = field(default_factory=list)
    training: list[SpeedRow] = field(default_factory=list)
    sites: list[SiteRow] = field(default_factory=list)
    tables: list[TextTable] = field(default_factory=list)
    profiles: list[Mapping[str, Any]] = field(default_factory=list)
    sparsities: list[Mapping[str, Any]] = field(default_factory=list)
    studies: list[Mapping[str, Any]] = field(default_factory=list)
    searches: list[Mapping[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_results(paths: Sequence[str | Path]) -> Results:
    """Read result files of any kind, and folders of studies.

    Raises:
        FileNotFoundError: a path does not exist.
        ConfigError: a file is not JSON, or is not a result; the message names the file and what is missing.
    """
    results = Results()
    for path in map(Path, paths):
        try:
            _read(path, results)
        except ConfigError:
            raise
        except UNFIT as error:
            raise unfit(path, error) from error
    return results


def unfit(path: Path, error: Exception, kind: str = "") -> ConfigError:
    """Return the error for a file that lacks a part of a result, or has something else in its place."""
    return ConfigError(f"{path}: not a complete {kind + ' ' * bool(kind)}result ({type(error).__name__}: {error})")


def _read(path: Path, results: Results) -> None:
    data = read_runs(path) if path.is_dir() else _read_json(path)
    kind = _kind(data, path)
    try:
        _READERS[kind](data, results)
    except UNFIT as error:
        raise unfit(path, error, kind) from error
    if data.get("partial"):
        results.notes.append(f"{path.name} is partial: {data.get('reason', 'its command did not end')}.")
    machine = data.get("machine_line") or data.get("machine", {}).get("line", "")
    for line in (machine, *data.get("machine_lines", ())):
        if line and line not in results.machines:
            results.machines.append(line)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a result file (expected a JSON object)")
    return data


def _kind(data: Mapping[str, Any], path: Path) -> str:
    kind = data.get("kind")
    if kind is None and data.get("rows"):
        kind = "layer" if "cache" in data["rows"][0] else None
    if not isinstance(kind, str) or kind not in _READERS:
        raise ConfigError(f"{path}: not a result file of nogemm (kind {kind!r}; known: {', '.join(_READERS)})")
    return kind


def _scores(figures: Mapping[str, Any]) -> dict[str, Score]:
    scores = {}
    for name, figure in figures.items():
        if name not in METRICS:
            continue
        if isinstance(figure, Mapping):
            scores[name] = Score(value=figure["value"], low=figure.get("low"), high=figure.get("high"))
        else:
            scores[name] = Score(value=float(figure))
    return scores


def _quality_row(row: Mapping[str, Any], recorded: bool) -> QualityRow:
    kept = {"kept": row["kept"]["mrr_at_10"]} if "kept" in row else {}
    return QualityRow(
        name=row.get("title", row["name"]),
        scores=_scores({**row["scores"], **kept}),
        ours=bool(row.get("ours", row["name"].startswith("lookup"))),
        recorded=recorded,
        flops=row.get("flops"),
        bytes_read=row.get("bytes_read"),
        parameters=row.get("parameters"),
        file_bytes=row.get("file_bytes"),
        peak_bytes=row.get("peak_bytes"),
        note=row.get("note") or _study_note(row),
    )


def _study_note(row: Mapping[str, Any]) -> str:
    """Say what a recorded row was trained on, and how it does on texts of another kind."""
    parts = [f"{row['tokens'] / 1e6:g} M tokens"] if row.get("tokens") else []
    if "other_domain" in row:
        other = row["other_domain"]
        kept = f"{100 * other['kept']['mrr_at_10']['value']:.1f} %"
        agreement = other.get("ours", {}).get("agreement", {}).get("value")
        parts.append(f"on WordNet glosses kept {kept}" + (f", agreement {agreement:.3f}" if agreement else ""))
    return ", ".join(parts)


def _read_quality(data: Mapping[str, Any], results: Results) -> None:
    settings = data["settings"]
    for group, path in (("teacher", settings["teacher"]), ("ours", settings["model"])):
        if group in data:
            name = Path(path).name + (f", packed {settings['pack']}" if group == "ours" and settings["pack"] else "")
            results.quality.append(
                QualityRow(
                    name=name, scores=_scores(data[group]), ours=group == "ours", note=f"{data['samples']} samples"
                )
            )


def _read_study(data: Mapping[str, Any], results: Results) -> None:
    results.quality += [_quality_row(row, True) for row in data["rows"]]
    if data.get("note"):
        results.notes.append(data["note"])


def _read_demo(data: Mapping[str, Any], results: Results) -> None:
    results.titles.append(data["title"])
    results.quality += [_quality_row(row, False) for row in data["quality"]]
    results.quality += [_quality_row(row, True) for row in data.get("recorded", [])]
    results.models += [_model_row(row, data["title"]) for row in data.get("latency", [])]
    results.sites += [_site_row(row) for row in data.get("sites", [])]
    results.notes += data.get("notes", [])


def _site_row(row: Mapping[str, Any]) -> SiteRow:
    before, after = row["before"], row["after"]
    return SiteRow(
        name=row["name"],
        config=config_line(row["config"]),
        fitted=row["fitted"],
        parameters_before=int(before["parameters"]),
        parameters_after=int(after["parameters"]),
        flops_before=before["flops"],
        flops_after=after["flops"],
    )


def config_line(config: Mapping[str, Any]) -> str:
    """Write a layer config as one line, nested configs in brackets."""
    fields = []
    for name, value in config.items():
        if name == "kind" or value is None:
            continue
        fields.append(f"{name} {config_line(value)}" if isinstance(value, Mapping) else f"{name} {value}")
    return f"{config['kind']}({', '.join(fields)})"


def _read_layer(data: Mapping[str, Any], results: Results) -> None:
    results.layers += [_layer_row(row, data) for row in data["rows"]]


def _read_model(data: Mapping[str, Any], results: Results) -> None:
    name = Path(data["settings"]["model"] or data["settings"]["dense"]).name
    results.models += [_model_row(row, name) for row in data["rows"]]


def _layer_row(row: Mapping[str, Any], data: Mapping[str, Any]) -> SpeedRow:
    settings = data["settings"]
    shape = f"{settings['d']} x {settings['hidden']}"
    return _speed_row(row, shape, (int(row["batch"]),), f"{row['cache']} tokens, {row['codes']} codes")


def _model_row(row: Mapping[str, Any], model: str) -> SpeedRow:
    return _speed_row(row, model, (int(row["batch"]), int(row["length"])), "")


def _read_train_step(data: Mapping[str, Any], results: Results) -> None:
    shape = f"{data['settings']['d']} x {data['settings']['hidden']}"
    for row in data["rows"]:
        results.training.append(_speed_row(row, shape, (int(row["tokens"]),), f"{row['codes']} codes"))


def _speed_row(row: Mapping[str, Any], shape: str, size: tuple[int, ...], setting: str) -> SpeedRow:
    return SpeedRow(
        shape=shape,
        contender=shown_name(row),
        ours=row["contender"].startswith("nogemm"),
        size=size,
        us=row.get("us_median"),
        us_p10=row.get("us_p10"),
        us_p90=row.get("us_p90"),
        ratio=row.get("ratio"),
        setting=setting,
        why_not=why_not(row),
        detail=row,
    )


def _read_profile(data: Mapping[str, Any], results: Results) -> None:
    for name in ("settings", "rooflines", "rows", "points", "counting", "energy"):
        data[name]  # a file that lacks one is refused here, with its name
    results.profiles.append(data)


def _read_runs(data: Mapping[str, Any], results: Results) -> None:
    title, _, rows = data["title"], data["metric"], data["rows"]
    for row in rows:
        _ = row["group"], row["baseline"]
    results.titles.append(title)
    results.studies.append(data)
    results.notes += data.get("notes", [])


def _read_sparsity(data: Mapping[str, Any], results: Results) -> None:
    for name in ("settings", "model", "tokens", "layers", "quality", "predicted", "speed"):
        data[name]
    results.sparsities.append(data)


def _read_tune(data: Mapping[str, Any], results: Results) -> None:
    if "dense" in data and "rows" not in data:  # stopped before there was a front
        results.notes.append("The search had no front yet when it was stopped.")
        return
    for name in NEEDED:
        data[name]
    results.searches.append(data)
    results.notes += data.get("notes", [])


_TABLES: dict[str, Callable[[Mapping[str, Any]], TextTable]] = {
    "methods": methods_table,
    "projections": projections_table,
    "hire-recall": hire_recall_table,
    "flips": flips_table,
    "distributed": distributed_table,
    "head": head_table,
    "lsh": lsh_table,
    "operator-host": operator_table,
    "table5": table5_table,
    "serve": serve_table,
    "topk": topk_table,
}


def _table_reader(make: Callable[[Mapping[str, Any]], TextTable]) -> Callable[[Mapping[str, Any], Results], None]:
    return lambda data, results: results.tables.append(make(data))


_READERS: dict[str, Callable[[Mapping[str, Any], Results], None]] = {
    "layer": _read_layer,
    "model": _read_model,
    "train-step": _read_train_step,
    "quality": _read_quality,
    "study": _read_study,
    "demo": _read_demo,
    "profile": _read_profile,
    "sparsity": _read_sparsity,
    STUDY_TABLE: _read_runs,
    "tune": _read_tune,
    **{kind: _table_reader(make) for kind, make in _TABLES.items()},
}
