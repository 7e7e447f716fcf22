"""The table of a study, from the result files in its folder: means over seeds, differences to its baseline, charts.

`nogemm study` writes `study.json` and a file for each run (`nogemm.study.store`). This reads them again, so that every
table comes from result files alone. Reading order: `read_runs`, `runs_table`, `runs_charts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nogemm.bench.quality.seeds import front, paired_difference, seed_mean
from nogemm.bench.report.svg import Interval, Point, legend, lines, number, scatter
from nogemm.bench.report.tables import TextTable
from nogemm.errors import ConfigError
from nogemm.files import parse_json

KIND = "study-table"
_FIGURES = (
    "ffn_flops", "ffn_bytes", "ffn_parameters", "parameters", "ffns", "tokens", "tokens_per_second", "seconds",
    "perplexity",
)  # fmt: skip
_COLOURS = 8


def read_runs(folder: str | Path) -> dict[str, Any]:
    """Return the table of the study whose results lie in a folder.

    Returns:
        {"kind", "study", "title", "of", "metric", "rows", "notes", "machine_lines"}. A row has "name", "title", "group"
        (of rows that are compared with each other), "baseline" (the row its difference is to), "layer", "seeds",
        "values" (by seed), "mean" and "difference" ({"value", "low", "high", "samples"} or None), "figures" (means),
        "lr", "at_edge", "chosen_on_itself" (its value is of the rows that chose its state), "errors" ([{"seed",
        "error"}]), "history" ([{"tokens", "value", "low", "high"}]), "latency" (rows of `nogemm bench layer`),
        "not_timed" (why not), "front" (no row of fewer FLOP is as good).
    Raises:
        ConfigError: the folder holds no study, or a file in it is damaged.
    """
    folder = Path(folder)
    head = _json(folder / "study.json")
    if head.get("kind") != "study-runs":
        raise ConfigError(f"{folder}: no results of a study (study.json is of kind {head.get('kind')!r})")
    metric, rows, machines = head["metric"], [], []
    for row in head["rows"]:
        found = _row(folder, row, metric["name"])
        machines += found.pop("machines")
        # Results of versions without groups name one baseline for all rows.
        rows.append({"group": "", "baseline": head.get("baseline")} | found)
    for group in _groups(rows):
        _compare(group, metric["lower"])
    names = ("study", "title", "of", "metric")
    return {
        "kind": KIND,
        **{name: head[name] for name in names},
        "rows": rows,
        "notes": _notes(rows),
        "machine_lines": list(dict.fromkeys(machines)),
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent}: no results of a study: {path.name} is missing") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: not a result file (expected a JSON object)")
    return found


def _row(folder: Path, row: Mapping[str, Any], metric: str) -> dict[str, Any]:
    runs = [_json(path) for seed in row["seeds"] if (path := folder / row["name"] / f"seed-{seed}.json").is_file()]
    try:
        done = [run for run in runs if run["status"] == "done"]
        values = {run["seed"]: run["value"] for run in done}
        errors = [{"seed": run["seed"], "error": run["error"]} for run in runs if run["status"] != "done"]
        figures = {
            name: fmean(known)
            for name in _FIGURES
            if (known := [run["figures"][name] for run in done if run["figures"].get(name) is not None])
        }
        machines = [run["machine"]["line"] for run in runs]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / row['name']}: a result is not complete ({error})") from error
    latency = folder / row["name"] / "latency.json"
    timed = _json(latency) if latency.is_file() else {"rows": [], "error": None}
    return {
        **row,
        "values": {str(seed): value for seed, value in values.items()},
        "mean": seed_mean(list(values.values())) if values else None,
        "difference": None,
        "figures": figures,
        "lr": done[0].get("lr") if done else None,
        "at_edge": any(run.get("at_edge") for run in runs),
        "chosen_on_itself": any(run["figures"].get("measured_on") == "validation" for run in done),
        "errors": errors,
        "history": _history(done, metric),
        "latency": timed["rows"],
        "not_timed": timed["error"],
        "front": False,
        "machines": machines,
    }


def _history(runs: Iterable[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """Return means over seeds of what was measured on the way, where every run measured."""
    found: dict[float, list[float]] = {}
    count = 0
    for run in runs:
        count += 1
        for tokens, value in {
            entry["tokens"]: entry.get(metric) for entry in run["figures"].get("history", [])
        }.items():
            if value is not None:
                found.setdefault(tokens, []).append(value)
    return [
        {"tokens": tokens, **{name: value for name, value in seed_mean(values).items() if name != "samples"}}
        for tokens, values in sorted(found.items())
        if len(values) == count
    ]


def _groups(rows: Sequence[Any]) -> list[list[Any]]:
    """Return the rows by group, in order."""
    found: dict[str, list[Any]] = {}
    for row in rows:
        found.setdefault(row["group"], []).append(row)
    return list(found.values())


def _compare(rows: Sequence[dict[str, Any]], lower: bool) -> None:
    """Fill in the differences to the baseline, and which rows of a group are on the front."""
    of = {row["name"]: {int(seed): value for seed, value in row["values"].items()} for row in rows}
    for row in rows:
        if row["baseline"] is not None and row["name"] != row["baseline"]:
            row["difference"] = paired_difference(of[row["name"]], of[row["baseline"]])
    # A row that lacks seeds is no rival yet: those that failed may be the hard ones.
    known = [row for row in rows if len(row["values"]) == len(row["seeds"]) and "ffn_flops" in row["figures"]]
    for index in front([(row["figures"]["ffn_flops"], row["mean"]["value"]) for row in known], lower):
        known[index]["front"] = True


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = [f"{row['title']}, seed {e['seed']}: {e['error']}" for row in rows for e in row["errors"]]
    notes += [f"{row['title']} was not timed: {row['not_timed']}" for row in rows if row["not_timed"]]
    chosen = [row["title"] for row in rows if row["chosen_on_itself"]]
    if chosen:
        notes.append(f"Measured on the validation rows that chose the state, which flatters it: {', '.join(chosen)}.")
    edge = [row["title"] for row in rows if row["at_edge"]]
    if edge:
        last = "The best learning rate is the last that was tried, and a better one may lie beyond"
        notes.append(f"{last}: {', '.join(edge)}.")
    return notes


def runs_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out a study: a row for each of its rows."""
    metric = result["metric"]
    named = {row["name"]: row for row in result["rows"]}
    bases = [row for row in result["rows"] if row["name"] == row["baseline"]]
    dense = bases[0] if bases else None
    latency = any(row["latency"] for row in result["rows"])
    batches = list(dict.fromkeys(entry["batch"] for row in result["rows"] for entry in row["latency"]))
    rates = any(row["lr"] is not None for row in result["rows"])
    lines_ = []
    for row in result["rows"]:
        figures, flops = row["figures"], row["figures"].get("ffn_flops")
        full = named[row["baseline"]]["figures"].get("ffn_flops") if row["baseline"] else None
        cells = [row["title"] + (" *" if row["front"] else ""), _runs(row), _interval(row["mean"])]
        if dense is not None:
            cells.append("baseline" if row["name"] == row["baseline"] else _interval(row["difference"], sign=True))
        cells.append("" if flops is None else f"{flops / 1e6:.3f}")
        if dense is not None:
            cells.append(f"{full / flops:.2f}" if full and flops else "")
        for name in ("ffn_parameters", "parameters"):
            cells.append(f"{figures[name] / 1e6:.2f}" if name in figures else "")
        cells.append(f"{figures['tokens'] / 1e6:.2f}" if "tokens" in figures else "")
        cells.append(f"{figures['tokens_per_second']:,.0f}" if "tokens_per_second" in figures else "")
        if rates:
            cells.append("" if row["lr"] is None else f"{row['lr']:.3g}")
        if latency:
            times = {entry["batch"]: entry.get("us_median") for entry in row["latency"]}
            cells += ["" if times.get(batch) is None else number(times[batch]) for batch in batches]
        lines_.append(cells)
    head = ["row", "runs", metric["label"]]
    if dense is not None:
        head.append(f"less that of {dense['title']}" if len(bases) == 1 else "less that of the baseline")
    head += ["FFN MFLOP", *(["fewer"] if dense is not None else []), "M in FFNs", "M in all", "M tokens", "tokens/s"]
    head += (["rate"] if rates else []) + ([f"us at {batch:,}" for batch in batches] if latency else [])
    hint = f"{result['title']}. In brackets: 95 % interval over seeds, Student's t"
    hint += "; differences are paired by seed" if dense is not None else ""
    hint += ". FFN MFLOP: all FFNs, one token, by cost(). *: no row of fewer FLOP is as good, of those with all seeds."
    return TextTable(title=result["title"], head=head, rows=lines_, hint=hint)


def _runs(row: Mapping[str, Any]) -> str:
    failed = f", {len(row['errors'])} failed" if row["errors"] else ""
    return f"{len(row['values'])}{failed}"


def _interval(figure: Mapping[str, Any] | None, sign: bool = False) -> str:
    if figure is None:
        return ""
    form = "{:+.4f}" if sign else "{:.4f}"
    value = form.format(figure["value"])
    if figure["low"] is None:
        return value
    return f"{value} ({form.format(figure['low'])} to {form.format(figure['high'])})"


def runs_charts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (caption, chart): the metric against FLOP with the front, and against tokens if measured on the way.

    Each group of rows has charts of its own.
    """
    metric, charts = result["metric"], []
    for group in _groups([row for row in result["rows"] if row["mean"] is not None]):
        of = f", {group[0]['group']}" if group[0]["group"] else ""
        charts += [(f"{metric['label']} against FLOP{of}", chart) for chart in _against_flop(metric, group)]
        charts += [(f"{metric['label']} against tokens{of}", chart) for chart in _against_tokens(metric, group)]
    return charts


def _against_flop(metric: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    points = [
        Point(
            row["figures"]["ffn_flops"] / 1e6, row["mean"]["value"], row["title"], 0 if row["front"] else 1,
            row["mean"]["low"], row["mean"]["high"],
        )
        for row in rows if "ffn_flops" in row["figures"]
    ]  # fmt: skip
    if len(points) < 2:
        return []
    return [scatter(points, x_label="MFLOP of all FFNs, one token", y_label=metric["label"], front=True)]


def _against_tokens(metric: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    measured = [row for row in rows if sum(entry["value"] > 0 for entry in row["history"]) > 1]
    if not measured:
        return []
    colours = [(row["title"], i % _COLOURS) for i, row in enumerate(measured)]
    series = [
        (title, colour, [(entry["tokens"], entry["value"]) for entry in row["history"] if entry["value"] > 0])
        for (title, colour), row in zip(colours, measured, strict=True)
    ]
    # The axis is logarithmic: an interval that reaches below 0 ends where the chart does.
    floor = min(value for _, _, points in series for _, value in points) / 2
    bars = [
        Interval(entry["tokens"], max(entry["low"], floor), entry["high"], colour)
        for (_, colour), row in zip(colours, measured, strict=True)
        for entry in row["history"]
        if entry["low"] is not None and entry["value"] > 0
    ]
    return [lines(series, x_label="tokens", y_label=metric["label"], intervals=bars) + legend(colours)]
