"""Draw slide.svg, the picture of the SLIDE and MONGOOSE layers: `python docs/figures/draw_slide.py`."""

from __future__ import annotations

from pathlib import Path

from draw_hire import KEPT, column, place
from draw_lookup import INK, OWN, PALE, SOFT, arrow, box, text

BITS = ("- +", "+ -")
BUCKETS = (((0, 3), (5, 11), (), (14, 1)), ((4,), (2, 13), (5, 14), (7, 9)))  # neurons in four buckets of two tables
HIT = (1, 2)  # the same codes as numbers


def draw() -> str:
    """Return the picture as SVG text."""
    parts = [box(20, 106, 50, 108, "x")]
    for i, (bits, buckets, hit) in enumerate(zip(BITS, BUCKETS, HIT, strict=True)):
        top = 46 + 132 * i
        parts += [arrow(74, 160, 104, top + 44), box(108, top + 24, 80, 40, bits)]
        parts += [text(148, top + 82, "signs: a code", SOFT, 12)]
        for number, members in enumerate(buckets):
            y = top + 25 * number
            mine = number == hit
            fill = f'fill="{OWN}" fill-opacity="0.35"' if mine else 'fill="none"'
            parts.append(f'<rect x="250" y="{y}" width="92" height="20" {fill} stroke="{SOFT}" stroke-width="0.7"/>')
            parts.append(text(296, y + 14, ", ".join(map(str, members)), INK, 11))
            if mine:
                parts.append(arrow(192, top + 44, 246, y + 10))
                parts += [arrow(346, y + 10, 426, place(neuron)) for neuron in members]
    parts += [*column(430, KEPT, 1.0, 90), text(475, 304, "neurons", SOFT, 12)]
    parts += [text(296, 304, "buckets of neurons", SOFT, 12)]
    parts += [f'<circle cx="592" cy="160" r="16" fill="none" stroke="{INK}" stroke-width="1.6"/>']
    parts += [text(592, 166, "+", INK, 20), *(arrow(524, place(neuron), 576, 160) for neuron in KEPT)]
    parts += [arrow(612, 160, 634, 160), box(638, 106, 46, 108, "y")]
    frame = f'<rect width="704" height="320" fill="#ffffff" stroke="{PALE}"/>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 704 320" font-family="system-ui, sans-serif">'
        "<title>SLIDE: hash the token, compute the neurons that lie in its buckets, add them up</title>"
        f"{frame}{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("slide.svg").write_text(draw(), encoding="utf-8")
