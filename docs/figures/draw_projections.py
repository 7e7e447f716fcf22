"""Draw projections.svg from a recorded run: `python docs/figures/draw_projections.py`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
INK, SOFT, PALE = "#1b2430", "#5b6675", "#d8dee6"
COLOURS = {
    "BH1": "#f2a07b",
    "BH2": "#e06a34",
    "BH3": "#c44a1c",
    "BH4": "#a8330a",
    "ShuffleNet": "#2b8a3e",
    "low rank": "#868e96",
    "Hadamard": "#1971c2",
    "ACDC": "#9c36b5",
    "D1HD2HD3H": "#0b7285",
}
WIDTH, HEIGHT, TOP, LEFT = 330, 260, 26, 52


def family(row: dict[str, Any]) -> str:
    """Name the line that a row belongs to."""
    names = {"shuffle": "ShuffleNet", "low_rank": "low rank", "hadamard_chain": "Hadamard", "acdc": "ACDC"}
    names["random_hadamard"] = "D1HD2HD3H"
    return names.get(row["projection"]) or f"BH{row['config']['rounds']}"


def draw(result: dict[str, Any]) -> str:
    """Return two panels: error against FLOP and against parameters, both on logarithmic axes to the dense cost."""
    parts = [
        *panel(result, "flops", "FLOP per token", LEFT, 8e3),
        *panel(result, "parameters", "parameters", LEFT + WIDTH + 60, 8e2),
    ]
    for i, (name, colour) in enumerate(COLOURS.items()):
        x, y = LEFT + 95 * (i % 8), TOP + HEIGHT + 58 + 18 * (i // 8)
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>')
        parts.append(text(x + 8, y, name, INK, 11, "start"))
    size = f'viewBox="0 0 {LEFT + 2 * WIDTH + 110} {TOP + HEIGHT + 92}"'
    title = "<title>Error of approximating a Gaussian matrix, against FLOP and parameters</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">{title}'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def panel(result: dict[str, Any], key: str, name: str, left: int, least: float) -> list[str]:
    """Draw one panel; its right edge is the dense projection's cost."""
    most = result["dense"][key]

    def place(row: dict[str, Any]) -> tuple[float, float]:
        share = math.log(row[key] / least) / math.log(most / least)
        return left + WIDTH * share, TOP + HEIGHT * (1.0 - row["error"])

    frame = f'x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="{SOFT}"'
    parts = [f"<rect {frame}/>"]
    for tick in (0.25, 0.5, 0.75):
        y = TOP + HEIGHT * (1.0 - tick)
        parts.append(f'<line x1="{left}" y1="{y}" x2="{left + WIDTH}" y2="{y}" stroke="{PALE}"/>')
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(text(left - 6, TOP + HEIGHT * (1.0 - tick) + 4, f"{tick:g}", SOFT, 11, "end"))
    for power in (3, 4, 5):
        if least < 10**power < most:
            x = left + WIDTH * math.log(10**power / least) / math.log(most / least)
            parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{TOP + HEIGHT}" stroke="{PALE}"/>')
            parts.append(text(x, TOP + HEIGHT + 16, f"{10**power:,}", SOFT, 11, "middle"))
    parts.append(text(left + WIDTH / 2, TOP + HEIGHT + 34, f"{name} (right edge: dense)", INK, 12, "middle"))
    parts.append(text(left, TOP - 8, "relative squared error", INK, 12, "start"))
    for line, colour in COLOURS.items():
        points = [place(row) for row in result["rows"] if family(row) == line and row[key]]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return parts


def text(x: float, y: float, words: str, colour: str, size: int, anchor: str) -> str:
    """Write words."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">{words}</text>'


if __name__ == "__main__":
    recorded = json.loads((ROOT / "benchmarks/results/intel-6-207/projections.json").read_text(encoding="utf-8"))
    Path(__file__).with_name("projections.svg").write_text(draw(recorded), encoding="utf-8")
