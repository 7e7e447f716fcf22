"""Results that are one table each, as text: the same rows for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nogemm.bench.engine.result import shown_name, why_not


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table ready to be shown: its first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    hint: str


def methods_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench methods` measured: a line per layer, then the dense engines."""
    batches = result["settings"]["batch"]
    facts = {entry["contender"]: entry for entry in result["methods"]}
    timed: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in result["rows"]:
        timed.setdefault(row["contender"], {})[row["batch"]] = row
    counted = any("active" in entry for entry in facts.values())  # older results have no counts
    rows = []
    for name, cases in timed.items():
        entry = facts.get(name)
        cells = ["", "", ""]
        if entry is not None:
            read = entry["bytes_read"][str(min(batches))]
            cells = [f"{entry['flops'] / 1e6:.3f}", f"{read / 1024:,.0f}", f"{entry['parameters'] / 1e6:.2f}"]
        if counted:
            cells += _active_cells(entry or {})
        for batch in batches:
            row = cases[batch]
            if row["us_median"] is None:
                cells += [why_not(row) or "not run", ""]
            else:
                ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
                cells += [f"{row['us_median']:.4g}", ratio]
        errors = [row["max_error"] for row in cases.values() if row.get("max_error") is not None]
        shown = shown_name(cases[min(batches)])
        rows.append([shown, *cells, f"{max(errors):.1e}" if errors else ""])
    times = [word for batch in batches for word in (f"us at {batch:,}", "ratio")]
    active = ["computed", "p95", "expected", "measured MFLOP", "expected MFLOP"] if counted else []
    head = ["layer", "MFLOP", f"KiB at {min(batches)}", "M parameters", *active, *times, "max error"]
    shape = f"d {result['settings']['d']}, hidden {result['settings']['hidden']}, ours {result['settings']['dtype']}"
    hint = f"{shape}. Microseconds per call on fresh tokens; ratio: torch fp32's time divided by the layer's."
    if counted:
        hint += " Computed: neurons of a token, mean and 95th percentile, in full chunks; expected: of uniform codes."
    published = [
        f"{row['published_ratio']:.3g}x at {row['batch']:,}" for row in result["rows"] if row.get("published_ratio")
    ]
    if published:
        hint += f" FFF's gather form against dense as a batch of products, published as 40x: {', '.join(published)}."
    return TextTable(title="Methods", head=head, rows=rows, hint=hint)


def _active_cells(entry: Mapping[str, Any]) -> list[str]:
    active = entry.get("active")
    if active is None:
        return [""] * 5
    counts = [f"{active[name]:,.1f}" for name in ("mean", "p95", "expected")]
    return [*counts, *(f"{active[name] / 1e6:.3f}" for name in ("flops", "expected_flops"))]


def projections_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench projections` measured."""
    rows = []
    for row in result["rows"]:
        theory = ["", ""]
        if row["closed_form"] is not None:
            theory = [f"{row['closed_form']:.4f}", f"{100 * row['deviation']:+.2f} %"]
        figures = [f"{row['flops'] / 1000:.1f}", f"{row['parameters']:,}", f"{row['error']:.4f}"]
        rows.append([f"{row['projection']}: {row['label']}", *figures, *theory, row["fit"]])
    return TextTable(
        title="Projections",
        head=["projection", "kFLOP", "parameters", "error", "closed form", "deviation", "fit"],
        rows=rows,
        hint=f"Relative squared error of the best fit to a Gaussian matrix of width {result['settings']['d']}.",
    )


def train_step_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench train-step` measured."""
    rows = []
    for row in result["rows"]:
        us, parts = row.get("us_median"), row.get("parts") or {}
        whole = [why_not(row) or "not run", ""] if us is None else [f"{us / 1e3:.4g}", f"{row['ratio'] or 1:.2f}"]
        each = [f"{parts[name] / 1e3:.4g}" if name in parts else "" for name in ("forward", "backward", "update")]
        rows.append([shown_name(row), row["codes"], *whole, *each])
    s = result["settings"]
    shape = f"{s['method']} d={s['d']}, hidden {s['hidden']}, {s['tokens']:,} tokens, {s['threads']} threads"
    return TextTable(
        title=f"Training step: {shape}",
        head=["contender", "codes", "ms", "ratio", "forward ms", "backward ms", "update ms"],
        rows=rows,
        hint=f"{shape}. Ratio: the contender's time divided by ours. Parts are medians of three steps of their own.",
    )


def hire_recall_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench recall` measured."""
    rows = []
    for row in result["rows"]:
        shares = [f"{row[name]:.4f}" for name in ("recall", "energy", "dense_energy", "computed", "kept")]
        rows.append([f"site {row['site']}", row["sketch"], f"{row['oversample']:g}", *shares])
    return TextTable(
        title="Recall of HireFFN",
        head=["layer", "sketch", "oversample", "recall", "energy", "of dense", "computed", "kept"],
        rows=rows,
        hint=f"Layers of {result['settings']['checkpoint']}, each on {result['settings']['tokens']} of its own tokens.",
    )


def head_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench head` measured."""
    rows = []
    for row in result["rows"]:
        us, ratio = row.get("us_median"), row.get("ratio")
        time = (why_not(row) or "not run") if us is None else f"{us:,.0f}"
        read = f"{row['bytes_read'] / result['vocabulary']:,.0f}" if "bytes_read" in row else ""
        share = f"{row['agreement']:.4f}" if "agreement" in row else ""
        computed = f"{row['rows']:,.0f}" if "rows" in row else ""
        times = [time, "" if ratio is None else f"{ratio:.2f}"]
        rows.append([row["contender"], f"{row['batch']:,}", *times, read, computed, share])
    return TextTable(
        title="Vocabulary heads",
        head=["head", "states", "us", "ratio", "bytes a row", "rows computed", "same tokens"],
        rows=rows,
        hint=f"{result['settings']['model']}: {result['vocabulary']:,} rows of {result['width']} numbers. Microseconds "
        "a call on fresh states; ratio: its time divided by that of the first line.",
    )


def generate_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench generate` measured."""
    rows = []
    for row in result["rows"]:
        speed, ratio = row.get("tokens_per_second"), row.get("ratio")
        rows.append(
            [
                row["contender"],
                (why_not(row) or "not run") if speed is None else f"{speed:.1f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{row['bytes_read'] / 1e6:,.0f}" if "bytes_read" in row else "",
                f"{row['perplexity']:.2f}" if "perplexity" in row else "",
            ]
        )
    settings = result["settings"]
    return TextTable(
        title="Generation",
        head=["engine", "tokens a second", "ratio", "MB a token", "perplexity"],
        rows=rows,
        hint=f"{settings['model']}: {settings['new_tokens']} tokens behind fresh prompts of {settings['prompt']} "
        "tokens, which take time, too. Ratio: time divided by that of the first line. MB a token: weights it reads. "
        f"Perplexity of {settings['text']} tokens; float32 has {result['perplexity_fp32']:.2f}.",
    )


def serve_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench serve` measured."""
    rows = []
    for row in result["rows"]:
        line = [row["contender"], str(row["clients"])]
        if row["us_median"] is None:
            rows.append([*line, why_not(row) or "not run", "", "", "", ""])
            continue
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        times = [f"{row[name] / 1000:.2f}" for name in ("us_median", "us_p99")]
        rows.append([*line, f"{row['texts_per_second']:.0f}", ratio, *times, f"{row['cosine']:.4f}"])
    settings = result["settings"]
    return TextTable(
        title="Serving",
        head=["server", "clients", "texts a second", "ratio", "ms", "p99 ms", "agreement"],
        rows=rows,
        hint=f"Requests of {settings['texts']} texts of at most {settings['tokens']} tokens, {settings['workers']} "
        f"workers of {settings['threads']} threads. Ratio: texts a second of the first line / its own. Agreement: with "
        "the torch model of the same weights.",
    )


def distributed_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `benchmarks/distributed.py` measured of heads on several ranks."""
    rows = []
    for row in result["rows"]:
        us, ratio = row.get("us_median"), row.get("ratio")
        time = (why_not(row) or "not run") if us is None else f"{us:,.0f}"
        sent = f"{row['bytes_sent']:,.0f}" if "bytes_sent" in row else ""
        share = f"{row['bytes_sent'] / row['naive_bytes']:.3%}" if row.get("naive_bytes") else ""
        found = [f"{row[name]:.4f}" if name in row else "" for name in ("recall", "expected_recall")]
        rows.append(
            [row["contender"], str(row["ranks"]), time, "" if ratio is None else f"{ratio:.2f}", sent, share, *found]
        )
    return TextTable(
        title="Vocabulary heads on several ranks",
        head=["head", "ranks", "us", "speed", "bytes sent", "of all logits", "recall", "expected"],
        rows=rows,
        hint=f"{result['settings']['model']}: {result['vocabulary']:,} rows of {result['width']} numbers, one thread a "
        "rank. Microseconds a state; speed: the first line's time divided by it; bytes that a rank sends for a state.",
    )


def topk_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench topk` measured: a line per contender and case."""
    rows = []
    for row in result["rows"]:
        us, ratio = row.get("us_median"), row.get("ratio")
        time = (why_not(row) or "not run") if us is None else f"{us:,.1f}"
        recall = f"{row['recall']:.4f}" if "recall" in row else ""
        case = [row["pattern"], f"{row['n']:,}", f"{row['k']:,}", f"{row['batch']:,}", str(row["threads"])]
        rows.append([row["contender"], *case, time, "" if ratio is None else f"{ratio:.2f}", recall])
    settings = result["settings"]
    return TextTable(
        title="The k largest numbers",
        head=["contender", "numbers", "n", "k", "rows", "threads", "us", "ratio", "recall"],
        rows=rows,
        hint=f"Microseconds a call on {settings['dtype']} rows that were just written; ratio: its time divided by that "
        f"of nogemm-exact. Recall: measured of the approximate form, which promises {settings['recall']:g}.",
    )


def flips_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench flips` measured."""
    rows = []
    for row in result["rows"]:
        shares = [f"{row[name]:.1e}" for name in ("bits_differ", "codes_differ", "tokens_differ")]
        errors = [f"{row[name]:.1e}" for name in ("widest", "other_batch", "max_error", "rms_error")]
        rows.append([row["layer"], row["isa"], row["dtype"], f"{row['batch']:,}", *shares, *errors])
    shares = ["bits differ", "codes", "tokens"]
    return TextTable(
        title="Bits that rounding flips",
        head=["layer", "kernels", "dtype", "batch", *shares, "widest", "other batch", "max error", "rms error"],
        rows=rows,
        hint="Shares that differ from float64. Widest: the largest value whose bit differs, over the values' root mean "
        f"square; other batch: bits that differ from those at {result['settings']['batch'][0]} tokens a call.",
    )


def lsh_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `nogemm bench lsh` found: a line per hash or sketch."""
    top = [str(x) for x in result["settings"]["top"]]
    rows = []
    for case in result["cases"]:
        for row in case["rows"]:
            figures = [f"{100 * share:.1f}" for share in row["found"].values()]
            costs = [f"{row['flops'] / 1000:.0f}", f"{row['bytes'] / 1024:.0f}"]
            rows.append([f"{case['case']}: {_searcher(row)}", *figures, f"{100 * row['computed']:.1f}", *costs])
        dense = case["dense"]
        everything = ["100.0"] * (len(top) + 1)
        costs = [f"{dense['flops'] / 1000:.0f}", f"{dense['bytes'] / 1024:.0f}"]
        rows.append([f"{case['case']}: all products", *everything, *costs])
    head = ["search", *(f"top {x} found %" for x in top), "looked at %", "kFLOP", "KiB"]
    hint = "Share of a token's strongest neurons among those looked at; cost per token of choosing and computing them."
    return TextTable(title="Finding the strongest neurons", head=head, rows=rows, hint=hint)


def _searcher(row: Mapping[str, Any]) -> str:
    if "tables" in row:
        return f"{row['method']} hashes, {row['bits']} bits, {row['tables']} tables"
    rank = "" if row["rank"] is None else f" {row['rank']}"
    return f"{row['method'].replace('_', ' ')}{rank} sketch, {row['candidates']} candidates"


def operator_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out what `benchmarks/operator_host.py` measured."""
    times = ("us_median", "us_p10", "us_p90")
    rows = [
        [
            f"{row['graph']}, {row['rest']}",
            str(row["threads"]),
            f"{row['batch']:,}",
            *(_microseconds(row[t]) for t in times),
        ]
        for row in result["rows"]
    ]
    return TextTable(
        title="The operator inside OpenVINO",
        head=["graph, precision of the rest", "threads", "tokens", "us", "p10", "p90"],
        rows=rows,
        hint="; ".join(result["found"]) + ".",
    )


def table5_table(result: Mapping[str, Any]) -> TextTable:
    """Lay out the summary of `benchmarks/table5.py`: a line per part and batch."""
    rows = []
    for case in result["cases"]:
        cells = [_microseconds(case["ours"].get(name)) for name in _TABLE5_OURS]
        rivals = [
            f"{case[name]} {_microseconds(case[f'{name}_us'])}" if case.get(name) else ""
            for name in ("fastest_dense", "fastest_equal_flop")
        ]
        ratio = "" if case["ratio"] is None else f"{case['ratio']:.2f}"
        rows.append([case["part"], f"{case['batch']:,}", *cells, *rivals, ratio])
    return TextTable(
        title="LookupFFN beside every dense engine",
        head=["part", "tokens", "int8", "bf16", "fp32", "fastest dense", "fastest dense of our FLOP", "ratio"],
        rows=rows,
        hint="Microseconds per call; ratio: the fastest dense layer of full width / our int8, in one run.",
    )


_TABLE5_OURS = tuple(f"nogemm-lookup-{dtype}" for dtype in ("int8", "bf16", "fp32"))


def _microseconds(us: float | None) -> str:
    return "" if us is None else f"{us:,.4g}"
