"""Draw hire.svg, the picture of the HireFFN layer: `python docs/figures/draw_hire.py`."""

from __future__ import annotations

from pathlib import Path

from draw_lookup import INK, OWN, PALE, SOFT, arrow, box, text

NEURONS = 16
CANDIDATES = (2, 5, 6, 11, 14)
KEPT = (5, 11, 14)


def draw() -> str:
    """Return the picture as SVG text."""
    parts = [box(20, 106, 50, 108, "x"), arrow(74, 160, 112, 160), *column(116, CANDIDATES, 0.35, 34)]
    parts += [text(143, 302, "sketch: all neurons, int4", SOFT, 12)]
    for i in CANDIDATES:
        parts.append(arrow(174, place(i), 276, place(i)))
    parts += [*column(280, CANDIDATES, 0.9, 120), text(340, 302, "candidates, exactly", SOFT, 12)]
    for i in KEPT:
        parts.append(arrow(404, place(i), 506, place(i)))
    parts += [*column(510, KEPT, 1.0, 70), text(545, 302, "the strongest", SOFT, 12)]
    parts += [
        f'<circle cx="626" cy="160" r="16" fill="none" stroke="{INK}" stroke-width="1.6"/>',
        text(626, 166, "+", INK, 20),
    ]
    for i in KEPT:
        parts.append(arrow(584, place(i), 610, 160))
    parts += [arrow(646, 160, 664, 160), box(668, 106, 40, 108, "y")]
    frame = f'<rect width="728" height="314" fill="#ffffff" stroke="{PALE}"/>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 728 314" font-family="system-ui, sans-serif">'
        f"<title>HireFFN: sketch all neurons, compute candidates exactly, add the strongest</title>{frame}"
        f"{''.join(parts)}</svg>\n"
    )


def place(neuron: int) -> int:
    """Return the height of a neuron's middle."""
    return 32 + 16 * neuron + 6


def column(x: int, marked: tuple[int, ...], opacity: float, width: int) -> list[str]:
    """Draw all neurons as bars, some of them marked."""
    bars = []
    for i in range(NEURONS):
        fill = f'fill="{OWN}" fill-opacity="{opacity}"' if i in marked else 'fill="none"'
        size = f'x="{x}" y="{32 + 16 * i}" width="{width}" height="12"'
        bars.append(f'<rect {size} {fill} stroke="{SOFT}" stroke-width="0.7"/>')
    return bars


if __name__ == "__main__":
    Path(__file__).with_name("hire.svg").write_text(draw(), encoding="utf-8")
