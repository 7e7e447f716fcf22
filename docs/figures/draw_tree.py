"""Draw tree.svg, the picture of the TreeFFN layer: `python docs/figures/draw_tree.py`."""

from __future__ import annotations

from pathlib import Path

INK, SOFT, OWN, PALE = "#1b2430", "#5b6675", "#d9480f", "#f1d9c9"
LEVELS = 4
PATH = (0, 2, 5, 11)  # right, left, left: the nodes of one token's way


def place(node: int) -> tuple[int, int]:
    """Return where a node of the heap order is drawn."""
    level = (node + 1).bit_length() - 1
    across = (node - (2**level - 1) + 0.5) / 2**level
    return int(120 + 420 * across), 44 + 62 * level


def draw() -> str:
    """Return the picture as SVG text."""
    parts = [box(20, 22, 60, 44, "x"), line(84, 44, place(0)[0] - 15, 44, OWN)]
    for node in range(1, 2**LEVELS - 1):
        parts.append(line(*place((node - 1) // 2), *place(node), OWN if node in PATH else PALE))
    for node in range(2**LEVELS - 1):
        parts.append(circle(*place(node), node in PATH))
    for node in PATH:
        x, y = place(node)
        parts.append(line(x + 12, y, 590, 137, SOFT))
    parts += [box(594, 115, 60, 44, "y"), text(624, 180, "sum of act(z) rows", SOFT, 12)]
    parts += [text(330, 268, "z > 0: right; else left. Only the marked neurons are computed.", SOFT, 12)]
    title = "<title>TreeFFN: walk down by the signs of the neurons, add up those on the way</title>"
    frame = f'<rect width="700" height="284" fill="#ffffff" stroke="{PALE}"/>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 284" font-family="system-ui, sans-serif">'
        f"{title}{frame}{''.join(parts)}</svg>\n"
    )


def box(x: int, y: int, width: int, height: int, label: str) -> str:
    """Draw a labelled box."""
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="6"'
    shape = f'<rect {place} fill="none" stroke="{INK}" stroke-width="1.4"/>'
    return shape + text(x + width // 2, y + height // 2 + 5, label, INK, 15)


def circle(x: int, y: int, visited: bool) -> str:
    """Draw a node."""
    fill = OWN if visited else "#ffffff"
    return f'<circle cx="{x}" cy="{y}" r="9" fill="{fill}" stroke="{OWN if visited else SOFT}" stroke-width="1.2"/>'


def line(x1: int, y1: int, x2: int, y2: int, colour: str) -> str:
    """Draw a line."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.5"/>'


def text(x: int, y: int, words: str, colour: str, size: int) -> str:
    """Write centred words."""
    return f'<text x="{x}" y="{y}" text-anchor="middle" font-size="{size}" fill="{colour}">{words}</text>'


if __name__ == "__main__":
    Path(__file__).with_name("tree.svg").write_text(draw(), encoding="utf-8")
