"""Say plainly where the dense layer is the faster one, from measured rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nogemm.activations import ACTIVATIONS
from nogemm.bench.layer import LayerBenchArgs, run_layer_bench
from nogemm.convert.report import ConversionReport

AGAINST = ("torch-fp32", "torch-bf16", "torch-int8")
BATCHES = (1, 16, 64, 512, 4096)


def dense_faster(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List the timed dense contenders that beat ours: {"contender", "batch", "cache", "speedup"}, ours / theirs."""
    return [
        {"contender": row["contender"], "batch": row["batch"], "cache": row["cache"], "speedup": 1.0 / row["ratio"]}
        for row in rows
        if not row["contender"].startswith("nogemm-") and row.get("ratio") is not None and row["ratio"] < 1.0
    ]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write `dense_faster` as a sentence; contenders that were not timed are not spoken of."""
    faster = dense_faster(rows)
    timed = sorted({row["batch"] for row in rows if row.get("ratio") is not None})
    if not timed:
        return "no contender was timed to its end"
    if not faster:
        return f"no dense contender was faster at {', '.join(f'{n:,}' for n in timed)} tokens"
    by_batch: dict[int, list[str]] = {}
    for entry in faster:
        by_batch.setdefault(entry["batch"], []).append(f"{entry['contender']} {entry['speedup']:.2g}x")
    return "dense was faster at " + "; ".join(f"{n:,} tokens: {', '.join(who)}" for n, who in sorted(by_batch.items()))


def compare_sites(
    report: ConversionReport,
    method: str,
    choices: Sequence[str],
    dtype: str,
    threads: int = 0,
    run: Callable[[LayerBenchArgs], dict[str, Any]] = run_layer_bench,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Time the layer of every kind of converted site beside the dense FFN it replaced, in torch's three precisions.

    Random weights of the same shape stand for the trained ones: uniform codes are the harder case for a lookup layer.

    Args:
        method, choices: the layer, as `nogemm bench layer --method --set` takes it.
        dtype: ours is packed in.
        threads: of every contender; 0: every usable core.
        run: times a layer.
        keep: called with the kinds that are done.
    Returns:
        one entry per kind: {"replaced", "sites": count, "rows", "dense_faster", "verdict"}; a site whose output is not
        as wide as its input has no rows, and says so in "verdict".
    Cost: about 10 seconds for each kind.
    """
    kinds: dict[tuple[Any, ...], dict[str, Any]] = {}
    for site in report.sites:
        replaced = asdict(site.replaced)
        kinds.setdefault(tuple(replaced.values()), {"replaced": replaced, "sites": 0})["sites"] += 1
    for kind in kinds.values():
        shape = kind["replaced"]
        if shape["d_out"] != shape["d_in"]:
            kind |= {"rows": [], "dense_faster": [], "verdict": "not timed: its output is not as wide as its input"}
            continue
        args = LayerBenchArgs(
            method=method,
            set=tuple(choices),
            d=shape["d_in"],
            hidden=shape["hidden"],
            activation=shape["activation"] if shape["activation"] in ACTIVATIONS else "gelu",
            gated=shape["gated"],
            dtype=dtype,
            batch=BATCHES,
            against=AGAINST,
            threads=threads,
        )
        rows = run(args)["rows"]
        kind |= {"rows": rows, "dense_faster": dense_faster(rows), "verdict": verdict(rows)}
        if keep is not None:
            keep([kind for kind in kinds.values() if "verdict" in kind])
    return list(kinds.values())
