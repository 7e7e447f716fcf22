"""The paper's Table 5, honestly: one layer of every method beside every dense engine, at every batch, in one command.

    python benchmarks/table5.py                    # every part that is not recorded yet, then the summary
    python benchmarks/table5.py --parts d512,d768  # these alone
    python benchmarks/table5.py --summary          # only the summary, from the parts recorded so far

A part is one interleaved run with a file of its own, `benchmarks/results/PROCESSOR/table5/PART.json`, so the command
may be stopped and called again. Leave the machine alone meanwhile: a part begins with its load average in the file. The
whole takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nogemm.bench import peers
from nogemm.bench.contenders.gather import EMBEDDING_BAG
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, add_ratios, measure
from nogemm.bench.engine.pool import CAP_BYTES, pool_size, write_pool
from nogemm.bench.engine.result import origin
from nogemm.bench.models import site_inputs
from nogemm.config import parse_layer
from nogemm.cost import Cost
from nogemm.files import write_json
from nogemm.hardware.cpu import machine, machine_line, processor, usable_cores
from nogemm.layers import FFN
from nogemm.running.measured import Keep, Note, measured

COMMAND = "python benchmarks/table5.py"
OURS = "nogemm-lookup-int8"  # what ratios are to
DENSE = (*peers.CONTENDERS, *peers.LAYERS_ONLY)
FEW_DENSE = ("torch-fp32", "torch-int8", "openvino-int8")
NARROW_DENSE = ("torch-fp32", "openvino-int8")
BATCHES = (1, 8, 64, 512, 4096, 32768)
MAIN_BATCHES = (1, 8, 64, 512, 4096, 16384, 32768)
COPIES = 12  # of a layer at batches up to 8; see `nogemm.bench.contenders.layer`
LONGEST_CALL = 5.0
MEMORY_SHARE = 0.25  # of the machine's memory that one contender's copies may take
LOOKUPS = {  # the paper's shapes
    512: ("tables=128", "bits=8", "projection.block=64"),
    768: ("tables=170", "bits=9", "projection.block=64"),
}
MINILM = ("tables=64", "bits=8", "projection.block=64")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One of ours: how it is called in the table, and what it is."""

    name: str
    method: str
    set: tuple[str, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """One run."""

    name: str
    d: int
    hidden: int
    ours: tuple[Layer, ...]
    dense: tuple[str, ...] = FEW_DENSE
    equal_flop: tuple[str, ...] = ()  # engines of a dense layer as narrow as our FLOP
    equal_active: tuple[str, ...] = ()  # engines of dense layers of as many neurons as a tree visits, as HireFFN keeps
    gather: bool = False
    batches: tuple[int, ...] = (1, 4096)
    threads: int = 0
    cache: str = "fresh"
    checkpoint: str | None = None
    seed: int = 0


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help="comma-separated names; default: all")
    parser.add_argument("--summary", action="store_true", help="only rebuild the summary")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results") / processor())
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/demo/model"), help="a distilled MiniLM")
    parser.add_argument("--seconds", type=float, default=0.1, help="aimed at per turn")
    args = parser.parse_args()
    parts = {part.name: part for part in all_parts(args.checkpoint if args.checkpoint.exists() else None)}
    wanted = args.parts.split(",") if args.parts else list(parts)
    unknown = [name for name in wanted if name not in parts]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; the parts are: {', '.join(parts)}")
    try:
        for name in [] if args.summary else wanted:
            record(parts[name], args.results / "table5" / f"{name}.json", args.seconds)
    finally:  # of what is there, when it is stopped, too
        summarise(list(parts), args.results)


def all_parts(checkpoint: Path | None) -> list[Part]:
    """List the runs: the paper's two shapes in full, then one thread, warm caches, trained codes, and the sweeps.

    Every engine and every method at once would not fit into 24 GB, so a shape's other methods have a run of their own.
    """
    parts = []
    for d, choices in LOOKUPS.items():
        full = Part(name=f"d{d}", d=d, hidden=4 * d, ours=lookups(choices), dense=DENSE, batches=MAIN_BATCHES)
        parts.append(full)
        others = replace(full, name=f"d{d}-methods", ours=methods(d, choices), dense=FEW_DENSE, batches=BATCHES)
        parts.append(replace(others, equal_flop=FEW_DENSE, equal_active=NARROW_DENSE, gather=True))
    for d, choices in LOOKUPS.items():
        some = Part(name=f"d{d}-1-thread", d=d, hidden=4 * d, ours=lookups(choices), threads=1)
        parts.append(replace(some, batches=(1, 64, 512, 4096)))
        parts.append(replace(some, name=f"d{d}-warm", threads=0, cache="warm", batches=(1, 64, 4096)))
    if checkpoint is not None:
        trained = Part(name="d384-trained", d=384, hidden=1536, ours=lookups(MINILM), checkpoint=str(checkpoint))
        parts.append(replace(trained, batches=(1, 64, 512, 4096)))
    return parts + sweeps()


def lookups(choices: tuple[str, ...], *dtypes: str) -> tuple[Layer, ...]:
    """Return a LookupFFN packed in each precision, int8 first."""
    kinds = dtypes or ("int8", "bf16", "fp32")
    return tuple(Layer(name=f"nogemm-lookup-{dtype}", method="lookup", set=choices, dtype=dtype) for dtype in kinds)


def methods(d: int, choices: tuple[str, ...]) -> tuple[Layer, ...]:
    """Return a layer of every method; YOSO's tables have 8 bits, because those of 10 fill 12 GiB in 12 copies."""
    others = {
        "tree": ("trees=1", "depth=11"),
        "hire": ("keep=0.05", "sketch=int4"),
        "slide": ("bits=8", "tables=16"),
        "mongoose": ("bits=8", "tables=16"),
        "yoso": (f"hashes={d // 4}", "bits=8"),
    }
    return lookups(choices, "int8") + tuple(
        Layer(name=f"nogemm-{name}-int8", method=name, set=fields, dtype="int8") for name, fields in others.items()
    )


def sweeps() -> list[Part]:
    """Vary one thing at a time around the larger shape; the width with the paper's smaller table count."""
    parts = []
    for d in (256, 512, 1024, 2048):
        parts.append(Part(name=f"width-{d}", d=d, hidden=4 * d, ours=lookups(LOOKUPS[512], "int8")))
    for d in (4096, 8192):  # the dense layers' copies at one token do not fit, nor does a third engine at the largest
        wide = Part(name=f"width-{d}", d=d, hidden=4 * d, ours=lookups(LOOKUPS[512], "int8"), batches=(4096,))
        parts.append(replace(wide, dense=FEW_DENSE if d < 8192 else FEW_DENSE[:2]))
        parts.append(replace(wide, name=f"width-{d}-1-token", batches=(1,)))
    for name, values in (("tables", (42, 85, 340)), ("bits", (6, 8, 10)), ("block", (16, 32, 128))):
        for value in values:
            field = "projection.block" if name == "block" else name
            choices = tuple(word for word in LOOKUPS[768] if not word.startswith(f"{field}="))
            ours = lookups((*choices, f"{field}={value}"), "int8")
            parts.append(Part(name=f"{name}-{value}", d=768, hidden=3072, ours=ours, dense=("torch-fp32",)))
    both = lookups(LOOKUPS[768], "int8", "fp32")
    unpadded = [replace(x, name=f"{x.name}-unpadded", set=(*x.set, "projection.pad=hadamard")) for x in both]
    pair = Part(name="unpadded", d=768, hidden=3072, ours=(*both, *unpadded), dense=FEW_DENSE)
    return [*parts, replace(pair, batches=(1, 64, 512, 4096, 16384))]


def record(part: Part, target: Path, seconds: float) -> None:
    """Run a part that has no file yet."""
    if target.exists() and not json.loads(target.read_text(encoding="utf-8")).get("partial"):
        say(f"{part.name}: recorded already in {target}")
        return
    start, threads = time.monotonic(), part.threads or usable_cores()
    head = origin(asdict(part) | {"threads": threads, "seconds": seconds})
    if part.checkpoint is not None:
        head["settings"]["checkpoint"] = "the demo's model"
    size = pool_size(part.d, largest_call=max(part.batches) * 2, cap_bytes=CAP_BYTES)
    with tempfile.TemporaryDirectory(prefix="nogemm-bench-") as folder:
        pool = Path(folder) / "tokens"
        source = None if part.checkpoint is None else site_inputs(Path(part.checkpoint), 0, seed=part.seed)
        write_pool(pool, size.tokens, part.d, seed=part.seed + 1, source_ND=source)
        codes = "uniform" if part.checkpoint is None else "trained"
        cases = [{"batch": batch, "cache": part.cache, "codes": codes} for batch in part.batches]
        plan = Plan(threads=threads, rounds=MIN_ROUNDS, seconds=seconds, longest_call=LONGEST_CALL)
        head |= {"part": part.name, "command": COMMAND, "pool": size.to_dict()}

        def finished(rows: list[dict[str, Any]]) -> dict[str, Any]:
            add_ratios(rows, OURS, ("batch", "cache", "codes"))
            return head | {"minutes": (time.monotonic() - start) / 60, "rows": rows}

        def work(note: Note, keep: Keep) -> dict[str, Any]:
            rows = measure(
                specs(part, pool),
                cases,
                plan,
                note=lambda line: note(f"{part.name}: {line}"),
                keep=lambda rows: keep(finished(rows)),
            )
            return finished(rows)

        measured("table5-part", target, work, lambda result: say(f"{part.name}: {len(result['rows'])} rows"))


def specs(part: Part, pool: Path) -> list[Spec]:
    """Say how the workers make every contender of a part; one whose copies would fill the memory gets a reason."""
    shape = {"d": part.d, "hidden": part.hidden, "activation": "gelu", "seed": part.seed, "pool": str(pool)}
    found = []
    for layer in part.ours:
        settings = shape | {"method": layer.method, "set": list(layer.set), "dtype": layer.dtype, "path": "auto"}
        settings |= {"checkpoint": part.checkpoint, "site": 0}
        full = too_large(part, cost_of(part, layer).parameters * {"fp32": 4, "bf16": 2, "int8": 1}[layer.dtype])
        factory = "nogemm.bench.contenders.layer:OurContender"
        found.append(Spec(name=layer.name, factory=factory, settings=settings, missing=full))
    if part.gather:
        bag = shape | {"method": "lookup", "set": list(part.ours[0].set)}
        factory = "nogemm.bench.contenders.gather:EmbeddingBagContender"
        found.append(Spec(name=EMBEDDING_BAG, factory=factory, settings=bag))
    dense = "nogemm.bench.contenders.layer:DenseContender"
    for name in part.dense:
        missing = peers.missing(name) or too_large(part, 8 * part.d * part.hidden)
        found.append(Spec(name=name, factory=dense, settings=shape | {"engine": name}, missing=missing))
    for name, width, label in narrow_dense(part):
        settings = shape | {"engine": name, "hidden": width}
        found.append(Spec(name=f"{name}, {label}", factory=dense, settings=settings, missing=peers.missing(name)))
    return found


def narrow_dense(part: Part) -> list[tuple[str, int, str]]:
    """List the narrow dense layers of a part, engine by engine: of our FLOP, or of as many neurons as answer."""
    widths = [(equal_width(part), "wide", part.equal_flop)] if part.equal_flop else []
    for layer in part.ours if part.equal_active else ():
        neurons = build(part, layer).active_neurons()
        if neurons is not None:
            widths.append((neurons, f"neurons as {layer.method}", part.equal_active))
    return [(name, width, f"{width} {what}") for width, what, engines in widths for name in engines]


def build(part: Part, layer: Layer) -> FFN:
    """Build a layer of ours without numbers in it."""
    with torch.device("meta"):  # shapes are enough
        return parse_layer(layer.method, layer.set).build(part.d, hidden=part.hidden)


def cost_of(part: Part, layer: Layer) -> Cost:
    """Return what a layer of ours costs for one token."""
    return build(part, layer).cost(1)


def too_large(part: Part, bytes_each: float) -> str | None:
    """Say why a contender is left out: its copies, with as much again for packing, would not fit."""
    memory = machine()["memory_bytes"]
    needed = COPIES * bytes_each * 2
    if not memory or min(part.batches) > 8 or needed <= 2 * MEMORY_SHARE * memory:
        return None
    return f"{COPIES} copies would take {needed / 2**30:.0f} GiB to prepare"


def equal_width(part: Part) -> int:
    """Return how wide a dense layer of our LookupFFN's FLOP is."""
    return max(1, round(cost_of(part, part.ours[0]).flops / (4 * part.d)))


def summarise(names: Sequence[str], results: Path) -> None:
    """Write, for every case, our times and the fastest dense contender's; print it."""
    cases = []
    for name in names:
        file = results / "table5" / f"{name}.json"
        if not file.exists():
            continue
        part = json.loads(file.read_text(encoding="utf-8"))
        for batch in dict.fromkeys(row["batch"] for row in part["rows"]):
            rows = [row for row in part["rows"] if row["batch"] == batch]
            cases.append({"part": name, "load_average": part["load_average"]} | summary_of(rows, batch))
    write_json(results / "table5.json", {"kind": "table5", "command": COMMAND, "line": machine_line(), "cases": cases})
    for case in cases:
        say(
            f"{case['part']:14s} {case['batch']:6,} tokens  ours int8 {show(case['ours'].get(OURS))}  fastest dense "
            f"{case['fastest_dense'] or 'none timed'} {show(case['fastest_dense_us'])}  ratio {show(case['ratio'])}"
        )


def summary_of(rows: Sequence[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Return one case: microseconds per call of ours and of the fastest dense layers, of full width and of our FLOP."""
    timed = {row["contender"]: row["us_median"] for row in rows if row.get("us_median") is not None}
    found: dict[str, Any] = {"batch": batch, "ours": {n: us for n, us in timed.items() if n.startswith("nogemm-")}}
    for key, dense in (
        ("fastest_dense", {name: us for name, us in timed.items() if name in DENSE}),
        ("fastest_equal_flop", {name: us for name, us in timed.items() if name.endswith(" wide")}),
    ):
        fastest = min(dense, key=lambda name: dense[name], default=None)
        found |= {key: fastest, f"{key}_us": dense.get(fastest)}
    us, ours = found["fastest_dense_us"], found["ours"].get(OURS)
    return found | {"ratio": us / ours if us and ours else None}


def show(value: float | None) -> str:
    """Write a figure, or that there is none."""
    return "none" if value is None else f"{value:,.4g}"


def say(line: str) -> None:
    """Print one line at once."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
