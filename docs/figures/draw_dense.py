"""Draw dense.svg, the picture of a narrow dense layer: `python docs/figures/draw_dense.py`."""

from __future__ import annotations

from pathlib import Path

from draw_lookup import INK, PALE, SOFT, text
from draw_shuffle import dot, line

NEURONS, KEPT, WIDTH = 12, (1, 4, 9), 6
KEEP = "#1971c2"
TOP, STEP = 24, 22


def draw() -> str:
    """Return the picture as SVG text."""
    parts = []
    for neuron in range(NEURONS):
        kept = neuron in KEPT
        colour, width = (KEEP, 1.1) if kept else (PALE, 0.7)
        for i in range(WIDTH):
            parts.append(line(64, outside(i), 230, inside(neuron), colour, width))
            parts.append(line(246, inside(neuron), 412, outside(i), colour, width))
    parts += [dot(238, inside(neuron), KEEP if neuron in KEPT else PALE) for neuron in range(NEURONS)]
    parts += [dot(x, outside(i), INK) for x in (56, 420) for i in range(WIDTH)]
    bottom = TOP + STEP * NEURONS + 10
    words = ((56, "x"), (146, "up"), (238, "the best neurons"), (330, "down, refitted"), (420, "y"))
    parts += [text(x, bottom, label, INK if len(label) == 1 else SOFT, 12) for x, label in words]
    frame = f'<rect width="476" height="{bottom + 16}" fill="#ffffff" stroke="{PALE}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 476 {bottom + 16}" font-family="system-ui, sans-serif">'
        "<title>A dense layer of which a few neurons stay, and the second matrix is solved for again</title>"
        f"{frame}{''.join(parts)}</svg>\n"
    )


def inside(neuron: int) -> float:
    """Return the height of a neuron."""
    return TOP + STEP * (neuron + 0.5)


def outside(i: int) -> float:
    """Return the height of an input or output channel, spread over the neurons' range."""
    return TOP + STEP * NEURONS * (i + 0.5) / WIDTH


if __name__ == "__main__":
    Path(__file__).with_name("dense.svg").write_text(draw(), encoding="utf-8")
