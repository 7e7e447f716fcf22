"""Charts as inline SVG text: scatter with intervals, lines on logarithmic axes, horizontal bars.

Colours are CSS classes (`s0` is ours, `s1`.. the others), so the page's light and dark themes apply to the charts too.
A chart is drawn 480 units wide: small enough that its text stays readable when a phone shrinks it.
Reading order: `Point`, `scatter`, `lines`, `bars`; the axes at the end.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from nogemm.bench.report.labels import LINE, Label, place, text_width, wrap

WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 44
COLOURS = 8
DASHES = ("none", "7 4", "2 3")  # series of one colour, such as ours in several dtypes, differ by their strokes


@dataclass(frozen=True)
class Point:
    """One marked value of a scatter chart; `low` and `high` draw its interval."""

    x: float
    y: float
    label: str
    series: int = 1
    low: float | None = None
    high: float | None = None
    hollow: bool = False


@dataclass(frozen=True)
class Interval:
    """A vertical interval of a line chart, from `low` to `high` at `x`."""

    x: float
    low: float
    high: float
    series: int


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart; `text` is printed behind the bar."""

    label: str
    value: float
    text: str
    series: int = 1


def scatter(points: Sequence[Point], *, x_label: str, y_label: str, height: int = 330, front: bool = False) -> str:
    """Draw labelled points with vertical intervals; x and y are linear, x starts just before 0.

    With `front` a line joins the points of series 0, from left to right.

    A label stands beside its mark where nothing else does. Where no room is left, the mark gets a letter, and the name
    stands behind that letter below the chart.
    """
    xs = [p.x for p in points]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    span = max(ys) - min(ys) or 0.1
    right = max(xs) * 1.12 or 1.0
    x_axis = _Axis(-0.04 * right, right, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(min(ys) - 0.12 * span, max(ys) + 0.12 * span, height - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x_label, y_label, height)]
    if front:
        joined = sorted((p.x, p.y) for p in points if p.series == 0)
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in joined)
        parts.append(f'<polyline class="k0" stroke-dasharray="{DASHES[1]}" points="{path}"/>')
    # Labels keep clear of every mark and interval, not only of those drawn so far.
    boxes = [(x_axis(p.x) - 6, y_axis(p.y) - 6, x_axis(p.x) + 6, y_axis(p.y) + 6) for p in points]
    boxes += [
        (x_axis(p.x) - 1, y_axis(p.high), x_axis(p.x) + 1, y_axis(p.low))
        for p in points
        if p.low is not None and p.high is not None
    ]
    room = (LEFT + 2.0, TOP - 4.0, WIDTH - 2.0, height - BOTTOM - 2.0)
    below: list[Point] = []
    for p in sorted(points, key=lambda p: (p.series, -p.y)):
        x, y = x_axis(p.x), y_axis(p.y)
        if p.low is not None and p.high is not None:
            ends = f'y1="{y_axis(p.low):.1f}" y2="{y_axis(p.high):.1f}"'
            parts.append(f'<line class="k{p.series}" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        style = f"k{p.series} hollow" if p.hollow else f"s{p.series}"
        parts.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"><title>{escape(p.label)}</title></circle>'
        )
        label = place(p.label, x, y, boxes, room, bold=p.series == 0)
        if label is None:
            below.append(p)
        else:
            boxes.append(label.box)
            parts.append(_label(label, x, y, strong=p.series == 0))
    for letter, p in zip(_letters(), below, strict=False):
        x, y = x_axis(p.x), y_axis(p.y)
        label = place(letter, x, y, boxes, room, bold=p.series == 0)
        where = ""
        if label is None:  # not even room for a letter
            where = f", at {number(p.x)}, {number(p.y)}"
        else:
            boxes.append(label.box)
            parts.append(_label(label, x, y, strong=p.series == 0))
        for i, line in enumerate(wrap(f"{letter}: {p.label}{where}", WIDTH - 32, bold=p.series == 0)):
            kind = "own" if p.series == 0 else "label"
            parts.append(f'<text class="{kind}" x="{12 if i == 0 else 28}" y="{height + 8}">{escape(line)}</text>')
            height += round(LINE + 2)
    return _svg(parts, height + (8 if below else 0), f"{y_label} against {x_label}")


def lines(
    series: Sequence[tuple[str, int, Sequence[tuple[float, float]]]],
    *,
    x_label: str,
    y_label: str,
    height: int = 300,
    intervals: Sequence[Interval] = (),
) -> str:
    """Draw one line per (name, colour, points) on two logarithmic axes, and intervals of positive numbers."""
    xs = [x for _, _, points in series for x, _ in points]
    ys = [y for _, _, points in series for _, y in points]
    ys += [y for bar in intervals for y in (bar.low, bar.high)]
    x_axis = _Axis(min(xs) / 1.3, max(xs) * 1.3, LEFT, WIDTH - RIGHT, log=True, ticks=sorted(set(xs)))
    y_axis = _Axis(min(ys) / 1.4, max(ys) * 1.4, height - BOTTOM, TOP, log=True)
    parts = [_frame(x_axis, y_axis, x_label, y_label, height)]
    dashes = _dashes([(name, colour) for name, colour, _ in series])
    for bar in intervals:
        ends = f'y1="{y_axis(bar.high):.1f}" y2="{y_axis(bar.low):.1f}"'
        parts.append(f'<line class="k{bar.series}" x1="{x_axis(bar.x):.1f}" x2="{x_axis(bar.x):.1f}" {ends}/>')
    for name, colour, points in sorted(series, key=lambda s: s[1], reverse=True):  # ours is drawn last, on top
        dash = f' stroke-dasharray="{dashes[name, colour]}"'
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="k{colour}{" strong" if colour == 0 else ""}"{dash} points="{path}"/>')
        for x, y in points:
            parts.append(
                f'<circle class="s{colour}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="{4 if colour == 0 else 3}">'
                f"<title>{escape(name)}: {number(y)} at {number(x)}</title></circle>"
            )
    return _svg(parts, height, f"{y_label} against {x_label}")


def bars(rows: Sequence[Bar]) -> str:
    """Draw one horizontal bar per row, from 0; a long name is broken into lines beside its bar."""
    figures = max(text_width(row.text, bold=row.series == 0) for row in rows) + 10
    column = min(0.45 * WIDTH, max(text_width(row.label, bold=row.series == 0) for row in rows))
    left = column + 14
    # The longest bar leaves room for the figure printed behind it.
    scale = max(WIDTH - left - figures, 20.0) / max(max(row.value for row in rows), 1e-30)
    parts = []
    y = 4.0
    for row in rows:
        names = wrap(row.label, column, bold=row.series == 0)
        tall = max(26.0, LINE * len(names) + 9)
        middle = y + (tall - 10) / 2
        long = max(row.value * scale, 1.5)
        weight = ' class="own"' if row.series == 0 else ""
        for i, line in enumerate(names):
            base = middle + 5 + LINE * (i - (len(names) - 1) / 2)
            parts.append(f'<text x="{left - 8:.1f}" y="{base:.1f}" text-anchor="end"{weight}>{escape(line)}</text>')
        bar = f'x="{left:.1f}" y="{middle - 8:.1f}" width="{long:.1f}" height="16"'
        parts.append(f'<rect class="s{row.series}" {bar} rx="2"><title>{escape(row.label)}</title></rect>')
        parts.append(f'<text x="{left + long + 6:.1f}" y="{middle + 5:.1f}"{weight}>{escape(row.text)}</text>')
        y += tall
    return _svg(parts, round(y + 4), "; ".join(f"{row.label} {row.text}" for row in rows))


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Return the colour key of a chart as HTML."""
    items = []
    for (name, colour), dash in _dashes(names).items():
        line = f'<line class="k{colour}" x1="0" x2="22" y1="6" y2="6" stroke-dasharray="{dash}"/>'
        items.append(f'<span><svg viewBox="0 0 22 12">{line}</svg>{escape(name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def _dashes(names: Sequence[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """Give each (name, colour) a stroke: the second of a colour is dashed, the third dotted."""
    found: dict[tuple[str, int], str] = {}
    for name, colour in dict.fromkeys(names):
        same = sum(1 for _, other in found if other == colour)
        found[name, colour] = DASHES[same % len(DASHES)]
    return found


def number(value: float, digits: int = 3) -> str:
    """Write a figure with `digits` significant digits, thousands grouped, without exponents for usual sizes."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude >= digits - 1:
        return f"{value:,.0f}"
    if magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{digits - 1 - magnitude}f}"


class _Axis:
    """Map values to pixels, linearly or by logarithm, and choose ticks."""

    def __init__(
        self,
        low: float,
        high: float,
        start: float,
        end: float,
        *,
        log: bool = False,
        ticks: Sequence[float] = (),
    ) -> None:
        self._f: Callable[[float], float] = math.log10 if log else float
        self._low, self._high = self._f(low), self._f(high)
        self._start, self._end = start, end
        self.ticks = self._log_ticks(low, high, ticks) if log else _linear_ticks(low, high)

    def __call__(self, value: float) -> float:
        share = (self._f(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._end - self._start)

    def _log_ticks(self, low: float, high: float, wanted: Sequence[float]) -> list[float]:
        if not wanted:
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            steps = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
            return [m * 10.0**e for e in decades for m in steps if low <= m * 10.0**e <= high]
        kept: list[float] = []
        for tick in wanted:  # labels closer than 44 units would run into each other
            if not kept or self(tick) - self(kept[-1]) >= 44:
                kept.append(tick)
        return kept


def _linear_ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step) + 1)]


def _frame(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str, height: int) -> str:
    parts = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in x_axis.ticks:
        parts.append(
            f'<text x="{x_axis(tick):.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{_tick(tick)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height - BOTTOM}" y2="{height - BOTTOM}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{height - 8}" text-anchor="middle">{escape(x_label)}</text>')
    y_middle = (TOP + height - BOTTOM) / 2
    turned = f'transform="translate(14 {y_middle:.0f}) rotate(-90)"'
    parts.append(f'<text class="name" {turned} text-anchor="middle">{escape(y_label)}</text>')
    return "".join(parts)


def _tick(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:g}"


def _label(label: Label, x: float, y: float, *, strong: bool) -> str:
    """Write a label at its place, with a thin line to its mark where it does not stand next to it."""
    leader = ""
    if label.leader:
        left, top, right, bottom = label.box
        near_x, near_y = min(max(x, left), right), bottom if bottom < y else top
        leader = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near_x:.1f}" y2="{near_y:.1f}"/>'
    kind = "own" if strong else "label"
    return f'{leader}<text class="{kind}" x="{label.x:.1f}" y="{label.y:.1f}">{escape(label.text)}</text>'


def _letters() -> Iterator[str]:
    """a, b, ... z, then a2, b2, ..."""
    for turn in itertools.count(1):
        for letter in string.ascii_lowercase:
            yield letter if turn == 1 else f"{letter}{turn}"


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
