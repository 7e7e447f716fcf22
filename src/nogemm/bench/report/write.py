"""Write result files as one self-contained HTML page: tables, and charts drawn in the page itself.

The page asks for nothing from outside: no script, no font, no picture. It follows the reader's light or dark theme and
fits a phone. Reading order: `write_report`, then the sections in the order of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, TypeVar

from nogemm.bench.profile.tables import energy_table, profile_table, projection_table, shape_line
from nogemm.bench.report.data import METRICS, UNFIT, QualityRow, Results, SpeedRow, read_results, unfit
from nogemm.bench.report.page import PAGE
from nogemm.bench.report.profile import profile_charts
from nogemm.bench.report.runs import runs_charts, runs_table
from nogemm.bench.report.sparsity import sparsity_charts
from nogemm.bench.report.svg import COLOURS, Bar, Point, bars, legend, lines, number, scatter
from nogemm.bench.report.tables import TextTable
from nogemm.bench.report.tune import tune_chart, tune_table, tune_title
from nogemm.bench.sparsity.tables import model_name, sparsity_tables
from nogemm.files import write_atomically

MIB = 1024 * 1024
NO_REASON = "its file gives no reason"
Key = TypeVar("Key")


def write_report(paths: Sequence[str | Path], output: str | Path, *, title: str | None = None) -> Path:
    """Write the report of `paths`, result files and folders of studies, to `output` and return its path.

    Raises:
        FileNotFoundError: a result is missing.
        ConfigError: a file is not a result, or no file was given.
    """
    results = read_results(paths)
    output = Path(output)
    try:
        page = render(results, title=title).encode()
    except UNFIT:
        _name_unfit(paths)
        raise
    write_atomically(output, page)
    return output


def _name_unfit(paths: Sequence[str | Path]) -> None:
    """Raise ConfigError for the first of the files that cannot be drawn."""
    for path in map(Path, paths):
        try:
            render(read_results([path])).encode()
        except UNFIT as error:
            raise unfit(path, error) from error


def render(results: Results, *, title: str | None = None) -> str:
    """Return the page of `results` as HTML text; sections without rows are left out."""
    heading = title or (results.titles[0] if results.titles else "nogemm: measured results")
    sections = [
        _tiles(results),
        _quality_section(results.quality),
        _layer_section(results.layers),
        _bars_section("Model: latency", results.models, "Whole model, one call. Size = (sequences, tokens in each)."),
        _bars_section("Training step", results.training, "Forward, backward and update of one layer."),
        _memory_section(results.quality),
        _sites_section(results),
        *(_runs_section(result) for result in results.studies),
        *(_table_section(table) for table in results.tables),
        *(_profile_section(result) for result in results.profiles),
        *(_sparsity_section(result) for result in results.sparsities),
        *(_search_section(result) for result in results.searches),
    ]
    machine = "".join(f"<p class='machine'>{escape(line)}</p>" for line in results.machines)
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in results.notes)
    return Template(PAGE).substitute(
        title=escape(heading), machine=machine, body="".join(s for s in sections if s) + notes
    )


def _table_section(table: TextTable) -> str:
    body = [([escape(cell) for cell in row], False) for row in table.rows]
    hint = f"<p class='hint'>{escape(table.hint)}</p>"
    return f"<section><h2>{escape(table.title)}</h2>{_table(table.head, body)}{hint}</section>"


def _runs_section(result: Mapping[str, Any]) -> str:
    table = runs_table(result)
    figures = "".join(_figure(caption, chart) for caption, chart in runs_charts(result))
    pairs = zip(table.rows, result["rows"], strict=True)
    body = [([escape(cell) for cell in cells], row["front"]) for cells, row in pairs]
    plots = f'<div class="charts">{figures}</div>' if figures else ""
    hint = f"<p class='hint'>{escape(table.hint)} The dashed line joins those rows.</p>"
    return f"<section><h2>{escape(table.title)}</h2>{plots}{_table(table.head, body)}{hint}</section>"


def _profile_section(result: Mapping[str, Any]) -> str:
    figures = "".join(_figure(caption, chart) for caption, chart in profile_charts(result))
    tables = [profile_table(result), energy_table(result), projection_table(result)]
    sections = "".join(_table_section(table) for table in tables if table.rows)
    return f'<section><h2>{escape(shape_line(result))}</h2><div class="charts">{figures}</div></section>{sections}'


def _sparsity_section(result: Mapping[str, Any]) -> str:
    name = escape(f"Which layers are sparse: {model_name(result)}")
    figures = "".join(_figure(caption, chart) for caption, chart in sparsity_charts(result))
    sections = "".join(_table_section(table) for table in sparsity_tables(result))
    return f'<section><h2>{name}</h2><div class="charts">{figures}</div></section>{sections}'


def _search_section(result: Mapping[str, Any]) -> str:
    chart = tune_chart(result)
    figure = f'<div class="charts">{_figure("Agreement against time", chart)}</div>' if chart else ""
    said = f"<p>{escape(result['verdict'])}</p><p class='hint'>Hollow marks were distilled for a short time alone.</p>"
    table = _table_section(tune_table(result))
    return f"<section><h2>{escape(tune_title(result))}</h2>{said}{figure}</section>{table}"


def _tiles(results: Results) -> str:
    """The few figures a reader wants first: ours beside the teacher."""
    ours = next((row for row in results.quality if row.ours and not row.recorded), None)
    teacher = next((row for row in results.quality if not row.ours and not row.recorded), None)
    tiles = []
    if ours and teacher:
        if "mrr_at_10" in ours.scores and "mrr_at_10" in teacher.scores:
            kept = ours.scores["mrr_at_10"].value / teacher.scores["mrr_at_10"].value
            tiles.append((f"{100 * kept:.1f} %", "of the teacher's MRR@10"))
        if "agreement" in ours.scores:
            tiles.append((f"{ours.scores['agreement'].value:.3f}", "agreement with the teacher"))
        if ours.flops and teacher.flops:
            tiles.append((f"{teacher.flops / ours.flops:.1f}x", "fewer FFN FLOP"))
    fastest = _best_ratio(results.models)
    if fastest:
        tiles.append(fastest)
    return _wrap_tiles(tiles)


def _best_ratio(rows: Sequence[SpeedRow]) -> tuple[str, str] | None:
    """Ours against torch fp32 at the largest size, and against whoever is the fastest dense contender there."""
    rows = [row for row in rows if row.us is not None and row.size == max(r.size for r in rows)]
    own = [row.us for row in rows if row.ours and row.us is not None]
    dense = {row.contender.partition(",")[0]: row.us for row in rows if not row.ours and row.us is not None}
    dense = {name: us for name, us in dense.items() if "+" not in name}  # others have fewer layers, or no FFNs
    if not own or "torch-fp32" not in dense:
        return None
    fastest = min(dense, key=lambda name: dense[name])
    others = "" if fastest == "torch-fp32" else f"; {dense[fastest] / min(own):.1f}x {fastest}, the fastest dense"
    return f"{dense['torch-fp32'] / min(own):.1f}x", f"the speed of torch fp32 at {_size(rows[0].size)}{others}"


def _wrap_tiles(tiles: Sequence[tuple[str, str]]) -> str:
    if not tiles:
        return ""
    cells = "".join(f"<div><b>{escape(big)}</b><span>{escape(small)}</span></div>" for big, small in tiles)
    return f'<div class="tiles">{cells}</div>'


def _quality_section(rows: Sequence[QualityRow]) -> str:
    if not rows:
        return ""
    charts = []
    for metric in ("agreement", "kept"):
        points = [point for row in rows if (point := _quality_point(row, metric)) is not None]
        if len(points) > 1:
            chart = scatter(points, x_label="FFN MFLOP per token and layer", y_label=METRICS[metric])
            charts.append(_figure(f"{METRICS[metric]} against cost", chart))
    hollow = "<p class='hint'>Hollow marks are recorded rows of a longer run. Bars are 95 % intervals.</p>"
    plots = f'<div class="charts">{"".join(charts)}</div>{hollow}' if charts else ""
    return f"<section><h2>Quality against cost</h2>{plots}{_quality_table(rows)}</section>"


def _quality_point(row: QualityRow, metric: str) -> Point | None:
    if row.flops is None:
        return None
    score = row.scores.get(metric)
    if score is None:
        # The teacher's agreement with itself, and what it keeps of itself, are 1 by definition.
        teacher = not row.ours and not row.recorded
        return Point(x=row.flops / 1e6, y=1.0, label=row.name) if teacher else None
    series = 0 if row.ours else 1
    return Point(row.flops / 1e6, score.value, row.name, series, score.low, score.high, row.recorded)


def _quality_table(rows: Sequence[QualityRow]) -> str:
    names = [name for name in METRICS if any(name in row.scores for row in rows)]
    head = ["model", *(METRICS[name] for name in names), "MFLOP", "parameters"]
    body = []
    for row in rows:
        cells = [_name_cell(row)]
        for name in names:
            score = row.scores.get(name)
            if score is None:
                cells.append("")
            elif score.low is None or score.high is None:
                cells.append(f"{score.value:.4f}")
            else:
                cells.append(f"{score.value:.4f}<small>{score.low:.4f} to {score.high:.4f}</small>")
        cells.append("" if row.flops is None else f"{row.flops / 1e6:.2f}")
        cells.append("" if row.parameters is None else f"{row.parameters / 1e6:.1f} M")
        body.append((cells, row.ours))
    hint = "<p class='hint'>MFLOP: one FFN, one token. Small figures: 95 % bootstrap interval.</p>"
    return _table(head, body) + hint


def _name_cell(row: QualityRow) -> str:
    mark = ' <em class="tag">recorded</em>' if row.recorded else ""
    note = f"<small>{escape(row.note)}</small>" if row.note else ""
    return f"{escape(row.name)}{mark}{note}"


def _layer_section(rows: Sequence[SpeedRow]) -> str:
    parts = []
    timed = [row for row in rows if row.us is not None]
    for shape, setting in _unique((row.shape, row.setting) for row in timed):
        chosen = [row for row in timed if (row.shape, row.setting) == (shape, setting)]
        colours = _colours(chosen)
        series = [(name, colour, _per_token(chosen, name)) for name, colour in colours]
        chart = lines(series, x_label="tokens in the batch", y_label="us per token")
        parts.append(_figure(f"{shape}, {setting}", chart + legend(colours)))
    if not rows:
        return ""
    plots = f'<div class="charts">{"".join(parts)}</div>'
    return f"<section><h2>Layer: speed against batch</h2>{plots}{_not_run(rows)}{_speed_table(rows, 'us')}</section>"


def _not_run(rows: Sequence[SpeedRow]) -> str:
    """Name what has no time, with the reason, where a reader of the charts looks for it."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.us is None:
            reasons.setdefault((row.contender, row.why_not or NO_REASON), []).append(_size(row.size))
    if not reasons:
        return ""
    every = len({row.size for row in rows})
    items = [
        f"<li><b>{escape(name)}</b>{'' if len(set(sizes)) == every else ' at ' + ', '.join(dict.fromkeys(sizes))}: "
        f"{escape(reason)}</li>"
        for (name, reason), sizes in reasons.items()
    ]
    return f"<div class='hint'>Not run:<ul>{''.join(items)}</ul></div>"


def _per_token(rows: Sequence[SpeedRow], contender: str) -> list[tuple[float, float]]:
    return sorted((r.size[0], r.us / r.size[0]) for r in rows if r.contender == contender and r.us is not None)


def _bars_section(title: str, rows: Sequence[SpeedRow], hint: str) -> str:
    parts = []
    several = len({row.shape for row in rows}) > 1
    for shape, setting, size in _unique((row.shape, row.setting, row.size) for row in rows):
        data = [
            Bar(row.contender, row.us, f"{number(row.us / 1000)} ms", 0 if row.ours else 1)
            for row in rows
            if (row.shape, row.setting, row.size) == (shape, setting, size) and row.us is not None
        ]
        if data:
            caption = ", ".join(part for part in (shape if several else "", _size(size), setting) if part)
            parts.append(_figure(caption, bars(sorted(data, key=lambda bar: bar.value))))
    if not rows:
        return ""
    plots = f'<div class="charts">{"".join(parts)}</div>'
    missing = _not_run(rows)
    return f"<section><h2>{title}</h2>{plots}<p class='hint'>{hint}</p>{missing}{_speed_table(rows, 'ms')}</section>"


def _speed_table(rows: Sequence[SpeedRow], unit: str) -> str:
    scale = 1000.0 if unit == "ms" else 1.0
    head = ["what", "contender", "size", f"median {unit}", f"p10 to p90 {unit}", "ratio"]
    extras = [
        (key, name)
        for key, name in (
            ("max_error", "max error"),
            ("flip_rate", "flip rate"),
            ("roofline_fraction", "of roofline"),
            ("bound", "bound"),
        )
        if any(row.detail.get(key) is not None for row in rows)
    ]
    body = []
    for row in rows:
        cells = [
            escape(", ".join(part for part in (row.shape, row.setting) if part)),
            escape(row.contender),
            _size(row.size),
            *_times(row, scale),
            "" if row.ratio is None else f"{row.ratio:.2f}",
        ]
        for key, _ in extras:
            value = row.detail.get(key)
            cells.append("" if value is None else escape(value if isinstance(value, str) else number(value, 2)))
        body.append((cells, row.ours))
    hint = "<p class='hint'>ratio = the contender's median / ours in the same run: above 1, ours is faster.</p>"
    table = _table([*head, *(name for _, name in extras)], body)
    return f"<details><summary>All timings</summary>{table}{hint}</details>"


def _times(row: SpeedRow, scale: float) -> tuple[str, str]:
    if row.us is None or row.us_p10 is None or row.us_p90 is None:
        return "not run", f"<small class='why'>{escape(row.why_not or NO_REASON)}</small>"
    return number(row.us / scale, 4), f"{number(row.us_p10 / scale)} to {number(row.us_p90 / scale)}"


def _memory_section(rows: Sequence[QualityRow]) -> str:
    parts = []
    for attribute, name in (
        ("bytes_read", "weight bytes read for one token, one FFN"),
        ("file_bytes", "size of the checkpoint"),
        ("peak_bytes", "peak memory of a process that runs it"),
    ):
        found = [(row, getattr(row, attribute)) for row in rows if getattr(row, attribute) and not row.recorded]
        if found:
            data = [Bar(row.name, value, _bytes(value), 0 if row.ours else 1) for row, value in found]
            parts.append(_figure(name, bars(data)))
    if not parts:
        return ""
    return f'<section><h2>Bytes and memory</h2><div class="charts">{"".join(parts)}</div></section>'


def _sites_section(results: Results) -> str:
    if not results.sites:
        return ""
    configs = _unique(site.config for site in results.sites)
    # One config for all is said once: repeated in every row it would crowd out the figures.
    said = f"<p>Every FFN became <code>{escape(configs[0])}</code>.</p>" if len(configs) == 1 else ""
    head = ["FFN", "started", "parameters", "MFLOP per token", *([] if said else ["replaced by"])]
    body = []
    for site in results.sites:
        cells = [
            escape(site.name),
            escape(site.fitted),
            f"{site.parameters_before / 1e6:.2f} M to {site.parameters_after / 1e6:.2f} M",
            f"{site.flops_before / 1e6:.2f} to {site.flops_after / 1e6:.2f}",
        ]
        body.append(([*cells, *([] if said else [f"<code>{escape(site.config)}</code>"])], False))
    return f"<section><h2>What was replaced</h2>{said}{_table(head, body)}</section>"


def _table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], bool]]) -> str:
    """`rows` hold HTML cells and whether the row is ours; a wide table scrolls inside its own box."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr{' class=own' if ours else ''}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        for cells, ours in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(caption: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{chart}</figure>"


def _colours(rows: Sequence[SpeedRow]) -> list[tuple[str, int]]:
    """Ours is colour 0; the others take the rest in order of appearance, and start again when they run out."""
    names = dict.fromkeys((row.contender, row.ours) for row in rows)
    others = [name for name, ours in names if not ours]
    own = [(name, 0) for name, ours in names if ours]
    return own + [(name, 1 + i % (COLOURS - 1)) for i, name in enumerate(others)]


def _unique(items: Iterable[Key]) -> list[Key]:
    return list(dict.fromkeys(items))


def _size(size: tuple[int, ...]) -> str:
    return f"{size[0]:,}" if len(size) == 1 else f"({', '.join(map(str, size))})"


def _bytes(value: float) -> str:
    return f"{number(value / MIB)} MiB" if value >= MIB else f"{number(value / 1024)} KiB"
