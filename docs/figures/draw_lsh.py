"""Draw lsh.svg from a recorded run: `python docs/figures/draw_lsh.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from draw_projections import INK, PALE, ROOT, SOFT, text

TOP, HEIGHT, WIDTH = 30, 230, 250
LEFT = (48, 358, 668)
RANDOM, LEARNED, INT8, LOW_RANK = "#1971c2", "#d9480f", "#2b8a3e", "#9c36b5"
X = "16"  # strongest neurons
Place = Callable[[float, float], tuple[float, float]]


def draw(result: dict[str, Any]) -> str:
    """Return three panels: found against tables, found against what is looked at, sizes of buckets."""
    real, gaussian = result["cases"]
    parts = [*by_tables(real), *by_share(real), *sizes(real, gaussian)]
    legend = (
        (RANDOM, "random hashes (SLIDE); thin: as angles predict"),
        (LEARNED, "learned hashes (MONGOOSE)"),
        (INT8, "int8 and int4 sketch (HiRE)"),
        (LOW_RANK, "low-rank sketch, rank 24, 48, 96"),
    )
    for i, (colour, words) in enumerate(legend):
        x, y = LEFT[0] + (0, 290, 490, 690)[i], TOP + HEIGHT + 62
        parts += [f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>', text(x + 8, y, words, INK, 11, "start")]
    title = "<title>Strongest neurons found by hashes and sketches, and the sizes of hash buckets</title>"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 {TOP + HEIGHT + 78}" '
        f'font-family="system-ui, sans-serif">{title}<rect width="100%" height="100%" fill="#ffffff"/>'
        f"{''.join(parts)}</svg>\n"
    )


def by_tables(case: dict[str, Any]) -> list[str]:
    """Draw the first panel: one line for each number of bits."""
    counts = sorted({row["tables"] for row in case["rows"] if row["method"] == "random"})

    def place(tables: float, share: float) -> tuple[float, float]:
        across = math.log(tables / counts[0]) / math.log(counts[-1] / counts[0])
        return LEFT[0] + WIDTH * across, TOP + HEIGHT * (1 - share)

    parts = frame(LEFT[0], f"share of the top {X} found", "tables (hashes of 4, 6, 8 bits)")
    parts += ticks(place, [(c, f"{c}") for c in counts if math.log2(c) % 2 == 0], SHARES)
    for bits in sorted({row["bits"] for row in case["rows"] if "bits" in row}):
        for method, colour in (("random", RANDOM), ("learned", LEARNED)):
            rows = [row for row in case["rows"] if row["method"] == method and row["bits"] == bits]
            parts += dots([place(row["tables"], row["found"][X]) for row in rows], colour, lined=method == "learned")
            if method == "random":
                parts.append(line([place(row["tables"], row["expected_found"][X]) for row in rows], colour, 1.0))
    return parts


def by_share(case: dict[str, Any]) -> list[str]:
    """Draw the second panel: what a search finds beside what a random choice of as many neurons would."""

    def place(looked: float, share: float) -> tuple[float, float]:
        return LEFT[1] + WIDTH * (1 + math.log10(max(looked, 0.01)) / 2), TOP + HEIGHT * (1 - share)

    parts = frame(LEFT[1], f"share of the top {X} found", "share of the neurons looked at (grey: by chance)")
    parts += ticks(place, [(0.01, "1 %"), (0.1, "10 %"), (1.0, "100 %")], SHARES)
    chance = [10 ** (-2 + 0.05 * i) for i in range(41)]
    parts.append(line([place(share, share) for share in chance], SOFT, 1.0))
    for bits in (6, 8):
        for method, colour in (("random", RANDOM), ("learned", LEARNED)):
            rows = [row for row in case["rows"] if row["method"] == method and row["bits"] == bits]
            points = [place(row["computed"], row["found"][X]) for row in rows if row["computed"] >= 0.01]
            parts += dots(points, colour)
    for method, colour in (("int8", INT8), ("int4", INT8), ("low_rank", LOW_RANK)):
        for rank in sorted({row["rank"] or 0 for row in case["rows"] if row["method"] == method}):
            rows = [row for row in case["rows"] if row["method"] == method and (row["rank"] or 0) == rank]
            parts += dots([place(row["computed"], row["found"][X]) for row in rows], colour)
    return parts


def sizes(real: dict[str, Any], gaussian: dict[str, Any]) -> list[str]:
    """Draw the third panel: the buckets of 6 bits, largest first."""
    chosen = [(part, bucket) for part in (real, gaussian) for bucket in part["buckets"] if bucket["bits"] == 6]
    most = 10 * math.ceil(max(bucket["sizes"][0] for _, bucket in chosen) / 10)
    even = real["hidden"] / 64

    def place(rank: float, size: float) -> tuple[float, float]:
        return LEFT[2] + WIDTH * rank / 63, TOP + HEIGHT * (1 - size / most)

    parts = frame(LEFT[2], "neurons in a bucket", "buckets of 6 bits, largest first")
    parts += ticks(place, [(0, "1"), (63, "64")], [(v, f"{v}") for v in range(0, most + 1, 20)])
    parts.append(line([place(0, even), place(63, even)], SOFT, 1.0))
    for part, bucket in chosen:
        if part is real or bucket["method"] == "random":
            colour = RANDOM if bucket["method"] == "random" else LEARNED
            points = [place(rank, size) for rank, size in enumerate(bucket["sizes"])]
            parts.append(line(points, colour, 2.0 if part is real else 1.0))
    parts.append(text(*place(62, even + 1), f"even: {even:g}", SOFT, 11, "end"))
    return [*parts, text(*place(40, most * 0.75), "thick: MiniLM; thin: Gaussian", SOFT, 11, "middle")]


SHARES = [(0.0, "0"), (0.25, ""), (0.5, "0.5"), (0.75, ""), (1.0, "1")]


def frame(left: int, above: str, below: str) -> list[str]:
    """Draw a panel's box and its titles."""
    box = f'x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="{SOFT}"'
    words = [
        text(left, TOP - 9, above, INK, 12, "start"),
        text(left + WIDTH / 2, TOP + HEIGHT + 34, below, INK, 12, "middle"),
    ]
    return [f"<rect {box}/>", *words]


def ticks(place: Place, across: Sequence[tuple[float, str]], up: Sequence[tuple[float, str]]) -> list[str]:
    """Draw grid lines with their labels."""
    left, bottom = place(across[0][0], up[0][0])
    parts = []
    for value, label in across:
        x, _ = place(value, up[0][0])
        parts += [line([(x, TOP), (x, bottom)], PALE, 1.0), text(x, bottom + 16, label, SOFT, 11, "middle")]
    for value, label in up:
        _, y = place(across[0][0], value)
        parts += [line([(left, y), (left + WIDTH, y)], PALE, 1.0), text(left - 6, y + 4, label, SOFT, 11, "end")]
    return parts


def line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    """Connect points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def dots(points: Sequence[tuple[float, float]], colour: str, *, lined: bool = True) -> list[str]:
    """Mark points, and connect them unless another line does."""
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in points]
    return [*marks, line(points, colour, 1.5)] if lined else marks


if __name__ == "__main__":
    recorded = json.loads((ROOT / "benchmarks/results/intel-6-207/lsh.json").read_text(encoding="utf-8"))
    Path(__file__).with_name("lsh.svg").write_text(draw(recorded), encoding="utf-8")
