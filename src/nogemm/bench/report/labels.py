"""Where the text of a chart goes: widths of words, places beside marks where nothing else stands, lines that fit.

Legend of a box: left, top, right, bottom, in the chart's units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
LINE = 15.0  # from one line of text to the next
_UP, _DOWN = 11.0, 3.0  # of a line, from its base
# Widths of system-ui's usual faces at 13 px, rounded up; bold is a little wider.
_NARROW, _WIDE = set("fijltI.,:;'|()[]! /-"), set("mwMWOQGD%@")


@dataclass(frozen=True)
class Label:
    """A word that was given a place: `x`, `y` of its base line's left end; `leader` if it stands away from its mark."""

    text: str
    x: float
    y: float
    box: Box
    leader: bool


def text_width(text: str, *, bold: bool = False) -> float:
    """Return about how wide a text is, rather too wide than too narrow."""
    width = sum(
        5.0 if c in _NARROW else 13.1 if c in _WIDE else 9.2 if c.isupper() else 8.2 if c.isdecimal() else 7.9
        for c in text
    )
    return width * (1.08 if bold else 1.0)


def overlap(a: Box, b: Box) -> bool:
    """Say whether two boxes share an area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def place(text: str, x: float, y: float, taken: Sequence[Box], room: Box, *, bold: bool = False) -> Label | None:
    """Find the free place nearest to a mark at (x, y).

    Args:
        taken: boxes that must stay visible.
        room: that the whole text must be in.
    Returns:
        None where nothing is free near it: the mark then gets a number instead, see `nogemm.bench.report.svg.scatter`.
    """
    width = text_width(text, bold=bold)
    for lift in (0, -16, 16, -30, 30, -44, 44, -58, 58, -72, 72):
        sides = [10.0, -10.0 - width] + ([-width / 2] if lift else [])
        for side in sides:
            left, base = x + side, y + lift + 4
            box = (left, base - _UP, left + width, base + _DOWN)
            inside = box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]
            if inside and not any(overlap(box, other) for other in taken):
                return Label(text, left, base, box, leader=abs(lift) > 17)
    return None


def wrap(text: str, width: float, *, bold: bool = False) -> list[str]:
    """Break a text at spaces and behind + - , into lines of at most `width`; a longer word is broken anywhere."""
    lines: list[str] = []
    line = ""
    for piece in _pieces(text):
        if text_width((line + piece).rstrip(), bold=bold) <= width:
            line += piece
            continue
        if line.strip():
            lines.append(line.strip())
        line = ""
        for character in piece.lstrip():
            if line and text_width(line + character, bold=bold) > width:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line.strip()] if line.strip() or not lines else lines


def _pieces(text: str) -> list[str]:
    pieces = [""]
    for character in text:
        pieces[-1] += character
        if character in " +-,/_":
            pieces.append("")
    return [piece for piece in pieces if piece]
