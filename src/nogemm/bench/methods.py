"""`nogemm bench methods`: every registered layer beside dense engines in one run, with its FLOP, bytes and parameters.

Reading order: `MethodsBenchArgs`, `run_methods_bench`, `presets`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nogemm.bench import peers
from nogemm.bench.contenders.layer import our_layer
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, measure
from nogemm.bench.engine.pool import CAP_BYTES, pool_size, write_pool
from nogemm.bench.engine.result import DTYPES, origin
from nogemm.bench.engine.row import Row
from nogemm.config import layer_class, layer_kinds, parse_layer
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import usable_cores
from nogemm.running.partial import Keep

REFERENCE = "torch-fp32"
ACTIVE_TOKENS = 1024  # that computed neurons are counted on; rounded up to whole chunks
_TIMES = ("us_median", "us_p10", "us_p90", "max_error", "rms_error", "calls")


@dataclass(frozen=True, kw_only=True)
class MethodsBenchArgs:
    """Say which layers are compared, on what.

    Attributes:
        d, hidden, activation: of the dense layer that is replaced.
        methods: kinds of layers; none given: every registered one.
        dtype: ours are packed in.
        batch: tokens per call, one case each.
        against: dense engines; torch-fp32 is always among them, because ratios are to it.
        threads: of every contender; 0 means every usable core.
        rounds, seconds: turns per contender and case, and the time aimed at per turn.
        seed: of weights and tokens.
        pool_cap_bytes: upper bound for the pool of fresh tokens.
    """

    d: int = 512
    hidden: int = 2048
    activation: str = "gelu"
    methods: tuple[str, ...] = ()
    dtype: str = "fp32"
    batch: tuple[int, ...] = (1, 64, 4096)
    against: tuple[str, ...] = (REFERENCE, "torch-int8")
    threads: int = 0
    rounds: int = MIN_ROUNDS
    seconds: float = 0.1
    seed: int = 0
    pool_cap_bytes: int = CAP_BYTES


def run_methods_bench(
    args: MethodsBenchArgs,
    *,
    more: Callable[[dict[str, Any]], list[Spec]] | None = None,
    note: Callable[[str], None] | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Verify and time one layer of every method, packed, on fresh tokens and random weights.

    Up to 8 tokens go through 12 copies of the layer in turn, as in a model; dense engines too. `keep` gets the
    result as it grows.

    Args:
        more: other contenders for layers of that shape, such as a paper's own forms of its layer.
    Returns:
        `origin` and {"methods", "rows"}. An entry of "methods" has "contender", "method", "config",
        "flops" (of one token), "bytes_read" (distinct weight bytes of a call, by batch, expected, as the unpacked layer
        stores them) and "parameters"; of a layer that retrieves neurons also "active", see `FFN.counted_neurons`. A row
        has "contender", "batch", "cache", "verified", the times, the errors, and "ratio", the median of torch-fp32
        divided by its own; or "error", or "missing". A row that names another in "published_against" has
        "published_ratio", to that one.
    Raises:
        ConfigError, ValueError: an unknown method, engine or dtype, or a shape that a chosen method cannot take.
    """
    args = _checked(args)
    chosen = presets(args)
    methods = [_describe(name, kind, words, args) for name, kind, words in chosen]
    head = origin(asdict(args))
    size = pool_size(args.d, largest_call=max(args.batch) * 2, cap_bytes=args.pool_cap_bytes)
    head |= {"pool": size.to_dict(), "methods": methods}

    def finished(rows: list[Row]) -> dict[str, Any]:
        for row in rows:
            row |= {name: row.get(name) for name in _TIMES}
        for row in rows:
            row["ratio"] = _ratio(row, rows, REFERENCE)
            if "published_against" in row:
                row["published_ratio"] = _ratio(row, rows, row["published_against"])
        return head | {"rows": rows}

    def kept(rows: list[Row]) -> None:
        if keep is not None:
            keep(finished(rows))

    with tempfile.TemporaryDirectory(prefix="nogemm-bench-") as folder:
        pool = Path(folder) / "tokens"
        write_pool(pool, size.tokens, args.d, seed=args.seed + 1, source_ND=None)
        cases = [{"batch": batch, "cache": "fresh"} for batch in args.batch]
        plan = Plan(threads=args.threads, rounds=args.rounds, seconds=args.seconds)
        specs = _specs(args, chosen, pool, more)
        return finished(measure(specs, cases, plan, note=note, keep=kept))


def presets(args: MethodsBenchArgs) -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (contender, kind, fields) of what is timed: the papers' shapes scaled to d, or a layer's defaults.

    Lookup 128 x 8 with BH4; YOSO with 256 hashes, of 8 bits because the tables of the inferred 10 would fill 6 GiB in
    12 copies; Switch with 8 experts of half the width; a shuffle of two groups; a sum of an eighth of the neurons and
    a lookup 64 x 8; a token table of BERT's vocabulary. SLIDE twice: its defaults, and chunks of 128 tokens with 3
    tables of 10 bits: uniform codes would retrieve the third that the published FLOP allow.
    """
    block = min(64, 1 << max(args.d - 1, 0).bit_length())
    known: dict[str, tuple[str, ...]] = {
        "lookup": ("tables=128", "bits=8", f"projection.block={block}"),
        "yoso": ("hashes=256", f"bits={min(8, block)}"),
        "switch": ("experts=8", f"hidden={max(args.hidden // 2, 1)}"),
        "shuffle": (f"block={max(args.d // 2, 1)}",),
        "token_table": ("vocabulary=30522",),
        "sum": (
            "terms=dense+lookup",
            f"dense.hidden={max(args.hidden // 8, 1)}",
            *("lookup.tables=64", "lookup.bits=8", f"lookup.projection.block={block}"),
        ),
    }
    chosen = [(f"nogemm-{kind}", kind, known.get(kind, ())) for kind in args.methods]
    if "slide" in args.methods:
        place = args.methods.index("slide") + 1
        chosen.insert(place, ("nogemm-slide-chunk128", "slide", ("bits=10", "tables=3", "chunk=128")))
    return chosen


def _checked(args: MethodsBenchArgs) -> MethodsBenchArgs:
    if args.dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, got {args.dtype!r}")
    if not args.batch or min(args.batch) < 1:
        raise ConfigError(f"--batch needs numbers of at least one token, got {args.batch}")
    if args.d < 1 or args.hidden < 1:
        raise ConfigError(f"--d and --hidden must be positive, got d={args.d}, hidden={args.hidden}")
    for kind in args.methods:
        layer_class(kind)  # of a sum, the terms are the preset's
    for name in args.against:
        peers.missing(name)
    against = tuple(dict.fromkeys((REFERENCE, *args.against)))
    return replace(args, methods=args.methods or layer_kinds(), against=against, threads=args.threads or usable_cores())


def _describe(name: str, kind: str, words: Sequence[str], args: MethodsBenchArgs) -> dict[str, Any]:
    config = parse_layer(kind, words)
    with torch.device("meta"):  # shapes are enough
        layer = config.build(args.d, hidden=args.hidden, activation=args.activation)
    one = layer.cost(1)
    active = {"active": _counted(kind, words, args)} if layer.retrieves else {}
    return active | {
        "contender": name,
        "method": kind,
        "config": config.to_dict(),
        "flops": one.flops,
        "bytes_read": {str(batch): layer.cost(batch).bytes_read for batch in args.batch},
        "parameters": one.parameters,
    }


def _counted(kind: str, words: Sequence[str], args: MethodsBenchArgs) -> dict[str, Any]:
    """Count on tokens as those that are timed, by the layer that is timed."""
    settings = {"method": kind, "set": list(words), "seed": args.seed}
    layer = our_layer(settings | {"d": args.d, "hidden": args.hidden, "activation": args.activation})
    generator = torch.Generator().manual_seed(args.seed + 1)
    count = -(-ACTIVE_TOKENS // layer.chunk) * layer.chunk
    return layer.counted_neurons(torch.randn(count, args.d, generator=generator))


def _specs(
    args: MethodsBenchArgs,
    chosen: Sequence[tuple[str, str, tuple[str, ...]]],
    pool: Path,
    more: Callable[[dict[str, Any]], list[Spec]] | None,
) -> list[Spec]:
    shape = {"d": args.d, "hidden": args.hidden, "activation": args.activation, "seed": args.seed, "pool": str(pool)}
    specs = []
    for name, kind, words in chosen:
        settings = shape | {"method": kind, "set": list(words), "dtype": args.dtype}
        specs.append(Spec(name=name, factory="nogemm.bench.contenders.layer:OurContender", settings=settings))
    specs += more(shape) if more is not None else []
    for name in args.against:
        settings = shape | {"engine": name}
        factory = "nogemm.bench.contenders.layer:DenseContender"
        specs.append(Spec(name=name, factory=factory, settings=settings, missing=peers.missing(name)))
    return specs


def _ratio(row: Row, rows: Sequence[Row], to: str) -> float | None:
    same = (r for r in rows if r["contender"] == to and r["batch"] == row["batch"])
    reference = next(same, {}).get("us_median")
    own = row["us_median"]
    return reference / own if reference is not None and own is not None else None
