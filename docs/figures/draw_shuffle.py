"""Draw shuffle.svg, the picture of the channel-shuffle layer: `python docs/figures/draw_shuffle.py`."""

from __future__ import annotations

from pathlib import Path

from draw_lookup import INK, PALE, SOFT, text

GROUPS, INPUTS, HIDDEN = 3, 2, 4  # channels per group
COLOURS = ("#d9480f", "#1971c2", "#2b8a3e")
TOP, STEP = 40, 22


def draw() -> str:
    """Return the picture as SVG text."""
    parts = []
    places = GROUPS * HIDDEN
    for group, colour in enumerate(COLOURS):
        inputs = [group * INPUTS + i for i in range(INPUTS)]
        hidden = [group * HIDDEN + j for j in range(HIDDEN)]
        parts += [line(64, spread(i), 196, height(j), colour, 0.9) for i in inputs for j in hidden]
        # Place j of group g goes to place j n + g: colours are those of the group that computed the channel.
        parts += [line(212, height(j), 356, height(moved(j)), colour, 1.6) for j in hidden]
        parts += [line(372, height(j), 504, spread(i), SOFT, 0.6) for i in inputs for j in hidden]
        parts += [dot(56, spread(i), colour) for i in inputs] + [dot(204, height(j), colour) for j in hidden]
        parts += [dot(364, height(moved(j)), colour) for j in hidden] + [dot(512, spread(i), INK) for i in inputs]
    bottom = TOP + STEP * places + 10
    words = ((56, "x"), (130, "up, by groups"), (284, "shuffle, act"), (438, "down, by groups"), (512, "y"))
    parts += [text(x, bottom, label, INK if len(label) == 1 else SOFT, 12) for x, label in words]
    frame = f'<rect width="568" height="{bottom + 16}" fill="#ffffff" stroke="{PALE}"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 568 {bottom + 16}" font-family="system-ui, sans-serif">'
        "<title>Channel shuffle: each group of hidden channels is dealt out to all groups of the second product</title>"
        f"{frame}{''.join(parts)}</svg>\n"
    )


def moved(place: int) -> int:
    """Return where the shuffle puts a hidden channel."""
    group, j = divmod(place, HIDDEN)
    return j * GROUPS + group


def height(place: int) -> float:
    """Return the height of a hidden channel."""
    return TOP - 16 + STEP * (place + 0.5)


def spread(place: int) -> float:
    """Return the height of an input or output channel, in the middle of its group."""
    group, i = divmod(place, INPUTS)
    return TOP - 16 + STEP * (group * HIDDEN + 1 + 2 * i)


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    """Draw a line."""
    return f'<line x1="{x1}" y1="{y1:g}" x2="{x2}" y2="{y2:g}" stroke="{colour}" stroke-width="{width}"/>'


def dot(x: float, y: float, colour: str) -> str:
    """Draw a channel."""
    return f'<circle cx="{x}" cy="{y:g}" r="7" fill="#ffffff" stroke="{colour}" stroke-width="1.8"/>'


if __name__ == "__main__":
    Path(__file__).with_name("shuffle.svg").write_text(draw(), encoding="utf-8")
