"""Draw switch.svg, the picture of the Switch layer: `python docs/figures/draw_switch.py`."""

from __future__ import annotations

from pathlib import Path

from draw_lookup import INK, OWN, PALE, SOFT, arrow, box, text

CHANCES = (0.1, 0.55, 0.2, 0.15)
CHOSEN = 1


def draw() -> str:
    """Return the picture as SVG text."""
    middle = 150
    parts = [box(20, 96, 50, 108, "x"), arrow(74, middle, 106, middle), box(110, 122, 84, 56, "router")]
    parts.append(text(152, 200, "E scores, softmax", SOFT, 12))
    for i, chance in enumerate(CHANCES):
        y = 46 + 70 * i
        mine = i == CHOSEN
        parts += [arrow(198, middle, 246, y), bar(250, y, chance, mine)]
        parts.append(expert(346, y - 26, mine, i))
        if mine:
            parts += [arrow(310, y, 342, y), text(272, y + 4, "p", "#ffffff", 12), text(327, y - 8, "x", SOFT, 12)]
    chosen = 46 + 70 * CHOSEN
    parts += [arrow(490, chosen, 536, middle), text(556, middle + 36, "times p", OWN, 13)]
    parts += [f'<circle cx="556" cy="{middle}" r="16" fill="none" stroke="{INK}" stroke-width="1.6"/>']
    parts += [text(556, middle + 8, "*", INK, 22), arrow(576, middle, 606, middle), box(610, 96, 50, 108, "y")]
    parts.append(text(418, 308, "E dense FFNs, one is read", SOFT, 12))
    frame = f'<rect width="680" height="322" fill="#ffffff" stroke="{PALE}"/>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 322" font-family="system-ui, sans-serif">'
        "<title>Switch: a linear router sends the token to the likeliest expert, whose answer it scales</title>"
        f"{frame}{''.join(parts)}</svg>\n"
    )


def bar(x: int, y: int, chance: float, mine: bool) -> str:
    """Draw an expert's probability."""
    size = f'x="{x}" y="{y - 7}" width="{int(100 * chance)}" height="14"'
    return f'<rect {size} fill="{OWN if mine else PALE}" stroke="{SOFT}" stroke-width="0.7"/>'


def expert(x: int, y: int, mine: bool, number: int) -> str:
    """Draw an expert: its two matrices, marked if it is the one that is read."""
    parts = []
    for place, height in ((x, 52), (x + 88, 52)):
        size = f'x="{place}" y="{y}" width="52" height="{height}" rx="3"'
        parts.append(f'<rect {size} fill="{OWN if mine else "none"}" fill-opacity="0.55" stroke="{SOFT}"/>')
    parts.append(text(x + 70, y + 31, "act", SOFT, 12))
    return "".join(parts) + text(x - 12, y + 50, str(number), SOFT, 11)


if __name__ == "__main__":
    Path(__file__).with_name("switch.svg").write_text(draw(), encoding="utf-8")
