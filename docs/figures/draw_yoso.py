"""Draw yoso.svg, the picture of the YOSO layer: `python docs/figures/draw_yoso.py`."""

from __future__ import annotations

from pathlib import Path

from draw_lookup import INK, OWN, PALE, SOFT, arrow, box, table, text

NEURONS = (2, 5, 2, 7, 0, 5, 3, 2)  # the bucket of each neuron in the table that is drawn
CHOSEN = 2  # the bucket that the token falls into: - + - as a number


def draw() -> str:
    """Return the picture as SVG text."""
    parts = [text(84, 26, "neurons, hashed once", SOFT, 12), text(296, 26, "a table of sums", SOFT, 12)]
    for i, bucket in enumerate(NEURONS):
        y = 40 + 26 * i
        mine = bucket == CHOSEN
        parts.append(
            f'<rect x="40" y="{y}" width="88" height="18" fill="{OWN if mine else "none"}" '
            f'fill-opacity="0.55" stroke="{SOFT}" stroke-width="0.7"/>'
        )
        parts.append(arrow(132, y + 9, 244, row(bucket)))
    parts += [*table(246, row(0) - 4, CHOSEN), box(40, 276, 50, 40, "x"), arrow(94, 296, 118, 296)]
    parts += [box(122, 276, 112, 40, "- + -"), text(178, 334, "signs of D H D H D H x", SOFT, 12)]
    way = f"M 238 296 H 374 V {row(CHOSEN)} H 356"  # round the table: its left side belongs to the neurons
    parts += [f'<path d="{way}" fill="none" stroke="{OWN}" stroke-width="1.3"/>']
    parts += [
        f'<circle cx="352" cy="{row(CHOSEN)}" r="2.6" fill="{OWN}"/>',
        text(296, 206, "a row per bucket", SOFT, 12),
    ]
    for i in range(3):
        parts += [*table(410, 40 + 92 * i, (2, 6, 1)[i]), arrow(514, 45 + 92 * i + 10 * (2, 6, 1)[i], 590, 164)]
    parts += [text(460, 334, "T tables, T hashes", SOFT, 12)]
    parts += [f'<circle cx="608" cy="164" r="16" fill="none" stroke="{INK}" stroke-width="1.6"/>']
    parts += [text(608, 170, "+", INK, 20), text(608, 204, "1 / T", OWN, 13), arrow(628, 164, 650, 164)]
    parts += [box(654, 110, 46, 108, "y")]
    frame = f'<rect width="720" height="346" fill="#ffffff" stroke="{PALE}"/>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 346" font-family="system-ui, sans-serif">'
        "<title>YOSO: neurons that share a bucket are summed once, a token averages the rows it falls on</title>"
        f"{frame}{''.join(parts)}</svg>\n"
    )


def row(bucket: int) -> int:
    """Return the height of a bucket's row in the table on the left."""
    return 104 + 10 * bucket


if __name__ == "__main__":
    Path(__file__).with_name("yoso.svg").write_text(draw(), encoding="utf-8")
