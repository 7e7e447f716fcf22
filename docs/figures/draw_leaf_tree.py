"""Draw leaf_tree.svg, the picture of the LeafTreeFFN layer: `python docs/figures/draw_leaf_tree.py`."""

from __future__ import annotations

from pathlib import Path

from draw_lookup import INK, OWN, PALE, SOFT, box, text
from draw_tree import circle, line

DEPTH = 2
PATH = (0, 2)  # right, then left: nodes of one token's way in evaluation
LEAF = 2
SOFT_SHARES = (0.12, 0.18, 0.45, 0.25)  # what training mixes


def draw() -> str:
    """Return the picture as SVG text."""
    parts = [box(20, 22, 60, 44, "x"), line(84, 44, place(0, 0)[0] - 12, 44, OWN)]
    for node in range(1, 2**DEPTH - 1):
        mine = node in PATH
        parts.append(line(*place(*split((node - 1) // 2)), *place(*split(node)), OWN if mine else PALE))
    for leaf in range(2**DEPTH):
        mine = leaf == LEAF
        x, y = place(DEPTH, leaf)
        parent = 2 ** (DEPTH - 1) - 1 + leaf // 2
        parts.append(line(*place(*split(parent)), x, y - 22, OWN if mine else PALE))
        fill = f'fill="{OWN}" fill-opacity="0.35"' if mine else 'fill="#ffffff"'
        size = f'x="{x - 40}" y="{y - 22}" width="80" height="40" rx="6"'
        parts.append(f'<rect {size} {fill} stroke="{OWN if mine else SOFT}" stroke-width="1.2"/>')
        parts += [text(x, y + 3, f"MLP {leaf}", INK, 13), text(x, y + 36, f"{SOFT_SHARES[leaf]:.2f}", SOFT, 12)]
        parts.append(line(x, y + 44, 330, 268, OWN if mine else PALE))
    parts += [circle(*place(*split(node)), node in PATH) for node in range(2**DEPTH - 1)]
    parts += [box(300, 270, 60, 36, "y")]
    parts += [text(596, 44, "training: all MLPs,", SOFT, 12), text(596, 60, "mixed by their shares", SOFT, 12)]
    parts += [text(596, 92, "evaluation: one way,", OWN, 12), text(596, 108, "one MLP", OWN, 12)]
    title = "<title>LeafTreeFFN: training mixes all leaf MLPs, evaluation walks down to one of them</title>"
    frame = f'<rect width="680" height="320" fill="#ffffff" stroke="{PALE}"/>'
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 320" font-family="system-ui, sans-serif">'
        f"{title}{frame}{''.join(parts)}</svg>\n"
    )


def split(node: int) -> tuple[int, int]:
    """Return the level of a node of the heap order, and its place in it."""
    level = (node + 1).bit_length() - 1
    return level, node - (2**level - 1)


def place(level: int, number: int) -> tuple[int, int]:
    """Return where a node, or a leaf below the last level, is drawn."""
    return int(120 + 420 * (number + 0.5) / 2**level), 44 + 70 * level


if __name__ == "__main__":
    Path(__file__).with_name("leaf_tree.svg").write_text(draw(), encoding="utf-8")
