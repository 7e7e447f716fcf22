"""Draw lookup.svg, the picture of the LookupFFN layer: `python docs/figures/draw_lookup.py`."""

from __future__ import annotations

from pathlib import Path

INK, SOFT, OWN, PALE = "#1b2430", "#5b6675", "#d9480f", "#f1d9c9"
BITS = ("- + -", "+ - +", "- + +")
ROWS = (2, 5, 3)  # the same codes as numbers: the row each of them chooses


def draw() -> str:
    """Return the picture as SVG text."""
    parts = [box(20, 96, 60, 108, "x"), arrow(84, 150, 118, 150), box(122, 96, 108, 108, "projection")]
    parts += [text(176, 226, "B H B H B H B H", SOFT, 12), arrow(234, 150, 262, 150)]
    for i, (bits, row) in enumerate(zip(BITS, ROWS, strict=True)):
        top = 24 + 92 * i
        parts += [box(266, top + 14, 84, 44, bits), text(308, top + 74, "signs: a code", SOFT, 12)]
        parts += [arrow(354, top + 36, 392, top + 10 * row + 5), *table(396, top, row)]
        parts += [arrow(500, top + 10 * row + 5, 560, 150)]
        parts += [text(528, top + 10 * row - (12 if i == 1 else 3), f"q{i + 1}", OWN, 13)]
    parts += [f'<circle cx="578" cy="150" r="16" fill="none" stroke="{INK}" stroke-width="1.6"/>']
    parts += [text(578, 156, "+", INK, 20), arrow(598, 150, 630, 150), box(634, 96, 60, 108, "y")]
    parts += [text(250, 302, "score q: how clear the signs are", SOFT, 12), text(446, 302, "tables of rows", SOFT, 12)]
    frame = f'<rect width="714" height="314" fill="#ffffff" stroke="{PALE}"/>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 714 314" font-family="system-ui, sans-serif">'
        f"<title>LookupFFN: project, take signs, read one row of each table, add</title>{frame}{''.join(parts)}</svg>\n"
    )


def box(x: int, y: int, width: int, height: int, label: str) -> str:
    """Draw a labelled box."""
    place = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="6"'
    shape = f'<rect {place} fill="none" stroke="{INK}" stroke-width="1.4"/>'
    return shape + text(x + width // 2, y + height // 2 + 5, label, INK, 15)


def table(x: int, y: int, chosen: int) -> list[str]:
    """Draw a table of eight rows with one of them chosen."""
    rows = []
    for i in range(8):
        fill = OWN if i == chosen else "none"
        rows.append(
            f'<rect x="{x}" y="{y + 10 * i}" width="100" height="9" fill="{fill}" stroke="{SOFT}" stroke-width="0.7"/>'
        )
    return rows


def arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    """Draw a line that ends in a dot, which needs no marker definitions."""
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{SOFT}" stroke-width="1.3"/>'
    return line + f'<circle cx="{x2}" cy="{y2}" r="2.6" fill="{SOFT}"/>'


def text(x: int, y: int, words: str, colour: str, size: int) -> str:
    """Write centred words."""
    return f'<text x="{x}" y="{y}" text-anchor="middle" font-size="{size}" fill="{colour}">{words}</text>'


if __name__ == "__main__":
    Path(__file__).with_name("lookup.svg").write_text(draw(), encoding="utf-8")
