"""Charts as inline SVG text: scatter with intervals, lines on logarithmic axes, horizontal bars.

Colours are CSS classes (`s0` is ours, `s1`.. the others), so the page's light and dark themes apply to the charts too.
A chart is drawn 480 units wide: small enough that its text stays readable when a phone shrinks it.
Reading order: `Point`, `scatter`, `lines`, `bars`; the axes at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 480
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 44
COLOURS = 8
DASHES = ("none", "7 4", "2 3")  # ours in several dtypes: one colour, several strokes


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
class Bar:
    """One row of a bar chart; `text` is printed behind the bar."""

    label: str
    value: float
    text: str
    series: int = 1


def scatter(points: Sequence[Point], *, x_label: str, y_label: str, height: int = 330) -> str:
    """Draw labelled points with vertical intervals; x and y are linear, x starts just before 0."""
    xs = [p.x for p in points]
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    span = max(ys) - min(ys) or 0.1
    right = max(xs) * 1.12 or 1.0
    x_axis = _Axis(-0.04 * right, right, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(min(ys) - 0.12 * span, max(ys) + 0.12 * span, height - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x_label, y_label, height)]
    # Labels keep clear of every mark, not only of the marks drawn so far.
    boxes = [(x_axis(p.x) - 6, y_axis(p.y) - 6, x_axis(p.x) + 6, y_axis(p.y) + 6) for p in points]
    for p in sorted(points, key=lambda p: (p.series, -p.y)):
        x, y = x_axis(p.x), y_axis(p.y)
        if p.low is not None and p.high is not None:
            ends = f'y1="{y_axis(p.low):.1f}" y2="{y_axis(p.high):.1f}"'
            parts.append(f'<line class="k{p.series}" x1="{x:.1f}" x2="{x:.1f}" {ends}/>')
        style = f"k{p.series} hollow" if p.hollow else f"s{p.series}"
        parts.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5.5"><title>{escape(p.label)}</title></circle>'
        )
        parts.append(_place_label(p.label, x, y, boxes, strong=p.series == 0, bottom=height - BOTTOM))
    return _svg(parts, height, f"{y_label} against {x_label}")


def lines(
    series: Sequence[tuple[str, int, Sequence[tuple[float, float]]]],
    *,
    x_label: str,
    y_label: str,
    height: int = 300,
) -> str:
    """Draw one line per (name, colour, points) on two logarithmic axes."""
    xs = [x for _, _, points in series for x, _ in points]
    ys = [y for _, _, points in series for _, y in points]
    x_axis = _Axis(min(xs) / 1.3, max(xs) * 1.3, LEFT, WIDTH - RIGHT, log=True, ticks=sorted(set(xs)))
    y_axis = _Axis(min(ys) / 1.4, max(ys) * 1.4, height - BOTTOM, TOP, log=True)
    parts = [_frame(x_axis, y_axis, x_label, y_label, height)]
    own = [name for name, colour, _ in series if colour == 0]
    for name, colour, points in sorted(series, key=lambda s: s[1], reverse=True):  # ours is drawn last, on top
        dash = f' stroke-dasharray="{DASHES[own.index(name) % len(DASHES)]}"' if colour == 0 else ""
        path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="k{colour}{" strong" if colour == 0 else ""}"{dash} points="{path}"/>')
        for x, y in points:
            parts.append(
                f'<circle class="s{colour}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="{4 if colour == 0 else 3}">'
                f"<title>{escape(name)}: {number(y)} at {number(x)}</title></circle>"
            )
    return _svg(parts, height, f"{y_label} against {x_label}")


def bars(rows: Sequence[Bar]) -> str:
    """Draw one horizontal bar per row, from 0."""
    label_width = min(240.0, 24 + 7.6 * max(len(row.label) for row in rows))
    step, bar = 26, 16
    height = step * len(rows) + 8
    # The longest bar leaves room for the figure printed behind it.
    room = WIDTH - label_width - 8.2 * max(len(row.text) for row in rows) - 12
    scale = room / max(max(row.value for row in rows), 1e-30)
    parts = []
    for i, row in enumerate(rows):
        y = 4 + step * i
        long = max(row.value * scale, 1.5)
        weight = ' class="own"' if row.series == 0 else ""
        parts.append(
            f'<text x="{label_width - 8:.0f}" y="{y + 13}" text-anchor="end"{weight}>{escape(row.label)}</text>'
        )
        parts.append(
            f'<rect class="s{row.series}" x="{label_width:.0f}" y="{y}" width="{long:.1f}" height="{bar}" rx="2"/>'
        )
        parts.append(f'<text x="{label_width + long + 6:.1f}" y="{y + 13}"{weight}>{escape(row.text)}</text>')
    return _svg(parts, height, "; ".join(f"{row.label} {row.text}" for row in rows))


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Return the colour key of a chart as HTML."""
    own = [name for name, colour in names if colour == 0]
    items = []
    for name, colour in names:
        dash = DASHES[own.index(name) % len(DASHES)] if colour == 0 else "none"
        line = f'<line class="k{colour}" x1="0" x2="22" y1="6" y2="6" stroke-dasharray="{dash}"/>'
        items.append(f'<span><svg viewBox="0 0 22 12">{line}</svg>{escape(name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


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


def _place_label(
    text: str,
    x: float,
    y: float,
    taken: list[tuple[float, float, float, float]],
    *,
    strong: bool,
    bottom: float,
) -> str:
    """Write `text` at the nearest free place beside its point, with a thin line to it when that is not next to it."""
    width = 6.7 * len(text)
    places = [(side, lift) for lift in (0, -16, 16, -32, 32, -48, 48, -64, 64) for side in (10, -10 - width)]
    for dx, dy in places:
        left, base = x + dx, y + dy + 4
        box = (left, base - 11, left + width, base + 2)
        inside = left >= LEFT and left + width <= WIDTH - 2 and TOP + 8 <= base < bottom
        if inside and not any(_overlap(box, other) for other in taken):
            break
    else:
        left, base = max(LEFT + 2.0, min(x + 10, WIDTH - width - 2)), y + 4
        box = (left, base - 11, left + width, base + 2)
    taken.append(box)
    near = left if left > x else left + width
    leader = ""
    if abs(base - 4 - y) > 17:
        leader = f'<line class="grid" x1="{x:.1f}" y1="{y:.1f}" x2="{near:.1f}" y2="{base - 4:.1f}"/>'
    return f'{leader}<text class="{"own" if strong else "label"}" x="{left:.1f}" y="{base:.1f}">{escape(text)}</text>'


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _svg(parts: Sequence[str], height: int, title: str) -> str:
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
