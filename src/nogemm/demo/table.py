"""The table that ends the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nogemm.bench.engine.result import why_not

MIB = 2**20


def print_result(result: Mapping[str, Any], report: Path, seconds: float) -> None:
    """Print quality, cost, sizes and latencies, recorded rows marked as such."""
    print(f"\n{result['title']}\n{result['machine']['line']}\n")
    rows = [quality_line(row, "") for row in result["quality"]]
    rows += [quality_line(row, " (recorded)") for row in result["recorded"]]
    head = ("", "MRR@10", "kept", "agreement", "old index", "MFLOP", "KiB read", "params", "file", "peak memory")
    print_columns(head, rows)
    print("kept: MRR@10 / the teacher's on the same texts. Old index: our queries, the teacher's documents, MRR@10.")
    print("MFLOP and KiB read: one FFN, one token. Recorded rows: a longer run on the whole corpus.\n")
    sizes = list(dict.fromkeys((row["batch"], row["length"]) for row in result["latency"]))
    contenders = list(dict.fromkeys(row["contender"] for row in result["latency"]))
    times = {(r["contender"], r["batch"], r["length"]): r.get("us_median") for r in result["latency"]}
    lines = [[name, *(milliseconds(times.get((name, *size))) for size in sizes)] for name in contenders]
    print_columns(["latency, ms", *(str(size) for size in sizes)], lines)
    for reason in dict.fromkeys(
        f"{row['contender']} not run: {why_not(row) or 'no reason given'}"
        for row in result["latency"]
        if row.get("us_median") is None
    ):
        print(reason)
    for note in result.get("notes", []):
        print(note)
    print(f"\nreport: {report}\nmodel:  {report.parent / 'model'}\n{seconds:.0f} seconds in this call")


def quality_line(row: Mapping[str, Any], mark: str) -> list[str]:
    """Write one model's row; what a row does not have stays empty."""
    scores = row["scores"]
    kept = row.get("kept", {}).get("mrr_at_10")
    values = [scores.get("mrr_at_10"), kept, scores.get("agreement"), scores.get("old_index_mrr_at_10")]
    cells = ["" if value is None else f"{value['value']:.4f}" for value in values]
    figures = (
        ("flops", 1e6, "{:.2f}"),
        ("bytes_read", 1024, "{:.0f}"),
        ("parameters", 1e6, "{:.1f} M"),
        ("file_bytes", MIB, "{:.0f} MiB"),
        ("peak_bytes", MIB, "{:.0f} MiB"),
    )
    cells += ["" if row.get(name) is None else form.format(row[name] / unit) for name, unit, form in figures]
    return [row.get("title", row["name"]) + mark, *cells]


def milliseconds(us: float | None) -> str:
    """Write a latency; a peer that could not run has none."""
    return "not run" if us is None else f"{us / 1000:.2f}"


def print_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns, the first to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = [
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
