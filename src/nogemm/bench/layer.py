"""`nogemm bench layer`: one layer of ours beside dense layers of the same shape, in every engine asked for.

Reading order: `LayerBenchArgs`, `run_layer_bench`, the roofline of a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nogemm.bench import peers
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, add_ratios, measure
from nogemm.bench.engine.pool import CAP_BYTES, pool_size, write_pool
from nogemm.bench.engine.result import origin, our_names
from nogemm.bench.engine.row import Row, fill
from nogemm.bench.models import site_inputs
from nogemm.config import parse_layer
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import caches, usable_cores
from nogemm.hardware.roofline import Roofline, measure_roofline
from nogemm.layers._base import PATHS
from nogemm.running.partial import Keep

_KEYS = ("batch", "cache", "codes")


@dataclass(frozen=True, kw_only=True)
class LayerBenchArgs:
    """Say which layer is timed, on what and against whom.

    Attributes:
        method: kind of our layer, such as "lookup"; `set` are its fields as "tables=64" or "projection.block=64".
        d, hidden, activation: shape of the dense layer that is replaced; hidden 0 means 4 d.
        gated: three matrices instead of two, in ours and in the dense layers.
        dtype: ours is packed in; of several, with commas, the first is the one that ratios are against.
        path: of our layer of neurons, see `nogemm.pack`.
        batch: tokens per call, one case each.
        against: dense contenders, see `nogemm.bench.peers.CONTENDERS`.
        cache: "fresh" and "warm", see `run_layer_bench`.
        threads: of every contender; 0 means every usable core.
        rounds, seconds: turns per contender and case, and the time aimed at per turn.
        checkpoint, site: take our layer, trained, from a distilled model's directory instead of building it; d, hidden
            and activation must be those of that model.
        seed: of weights and tokens.
        pool_cap_bytes: upper bound for the pool of fresh tokens.
    """

    method: str = "lookup"
    set: tuple[str, ...] = ()
    d: int = 384
    hidden: int = 0
    activation: str = "gelu"
    gated: bool = False
    dtype: str = "fp32"
    path: str = "auto"
    batch: tuple[int, ...] = (1, 64, 512, 4096)
    against: tuple[str, ...] = peers.CONTENDERS
    cache: tuple[str, ...] = ("fresh",)
    threads: int = 0
    rounds: int = MIN_ROUNDS
    seconds: float = 0.1
    checkpoint: str | None = None
    site: int = 0
    seed: int = 0
    pool_cap_bytes: int = CAP_BYTES


def run_layer_bench(
    args: LayerBenchArgs,
    *,
    note: Callable[[str], None] | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Verify and time our packed layer and its dense contenders; `keep` gets the result as it grows.

    "fresh": every timed call takes the next tokens of a pool that is larger than the caches, and up to 8 tokens go
    through 12 copies of the layer in turn, dense peers too. "warm": one layer, the same tokens again and again.

    Returns:
        `origin` and {"roofline", "pool", "rows"}; a row has "contender", "batch",
        "cache", "codes", "verified", "max_error", "us_median", "us_p10", "us_p90" (per call of one layer),
        "us_per_token", "ratio" (its median / ours), "gflops", "gb_per_s", "roofline_fraction", "bound". Ours also has
        "native": false where PyTorch operators stood in for the kernel, null where there is none by design; a
        LookupFFN or TreeFFN "flip_rate" (`nogemm.bench.flips`), a HireFFN "recall" and "energy". A
        contender that is not installed has "missing", one that failed or does not match its reference has "error";
        neither has a time.
    Raises:
        ConfigError, ValueError: an unknown method, field, contender or cache, or fewer than seven rounds.
    """
    args = checked(args)
    ours = our_names(args.dtype)[0]
    head = origin(asdict(args) | {"ours": ours})
    roofline = measure_roofline(args.threads)
    size = pool_size(args.d, largest_call=max(args.batch) * 2, cap_bytes=args.pool_cap_bytes)
    head |= {"roofline": None if roofline is None else roofline.to_dict(), "pool": size.to_dict()}

    def finished(rows: list[Row]) -> dict[str, Any]:
        add_ratios(rows, ours, _KEYS)
        for row in rows:
            _add_rates(row, roofline, args)
        return head | {"rows": rows}

    def kept(rows: list[Row]) -> None:
        if keep is not None:
            keep(finished(rows))

    with tempfile.TemporaryDirectory(prefix="nogemm-bench-") as folder:
        pool = Path(folder) / "tokens"
        write_pool(pool, size.tokens, args.d, seed=args.seed + 1, source_ND=token_source(args))
        codes = "uniform" if args.checkpoint is None else "trained"
        cases = [{"batch": b, "cache": cache, "codes": codes} for cache in args.cache for b in args.batch]
        plan = Plan(threads=args.threads, rounds=args.rounds, seconds=args.seconds)
        rows = measure(_specs(args, pool), cases, plan, note=note, keep=kept)
    return finished(rows)


def checked(args: LayerBenchArgs) -> LayerBenchArgs:
    """Return the arguments with their defaults filled in; raise where one cannot be used."""
    our_names(args.dtype)
    unknown = [cache for cache in args.cache if cache not in ("fresh", "warm")]
    if unknown or not args.cache:
        raise ConfigError(f"--cache must be fresh, warm or both, got {', '.join(unknown) or 'nothing'}")
    if not args.batch or min(args.batch) < 1:
        raise ConfigError(f"--batch needs numbers of at least one token, got {args.batch}")
    if args.d < 1 or args.hidden < 0:
        raise ConfigError(f"--d and --hidden must be positive, got d={args.d}, hidden={args.hidden}")
    if args.path not in PATHS:
        raise ConfigError(f"--path must be one of {', '.join(PATHS)}, got {args.path!r}")
    parse_layer(args.method, args.set)
    for name in args.against:
        peers.missing(name)
    return replace(args, hidden=args.hidden or 4 * args.d, threads=args.threads or usable_cores())


def _specs(args: LayerBenchArgs, pool: Path) -> list[Spec]:
    shape = {"d": args.d, "hidden": args.hidden, "activation": args.activation, "seed": args.seed, "pool": str(pool)}
    shape["gated"] = args.gated
    ours = {"method": args.method, "set": list(args.set), "path": args.path}
    trained = {"checkpoint": args.checkpoint, "site": args.site}
    factory = "nogemm.bench.contenders.layer:OurContender"
    specs = [
        Spec(name=name, factory=factory, settings=shape | ours | trained | {"dtype": name.partition("-")[2]})
        for name in our_names(args.dtype)
    ]
    for name in args.against:
        factory = "nogemm.bench.contenders.layer:DenseContender"
        specs.append(Spec(name=name, factory=factory, settings=shape | {"engine": name}, missing=peers.missing(name)))
    return specs


def token_source(args: LayerBenchArgs) -> Any:
    """Return activations that a trained layer really sees, or None for random tokens."""
    if args.checkpoint is None:
        return None
    return site_inputs(Path(args.checkpoint), args.site, seed=args.seed)


def _add_rates(row: Row, roofline: Roofline | None, args: LayerBenchArgs) -> None:
    """Turn work and time into rates, and hold them against the roofline."""
    us = row.get("us_median")
    rates = ("us_per_token", "gflops", "gb_per_s", "roofline_fraction", "bound")
    fill(row, ("us_median", "us_p10", "us_p90", "max_error", *rates))
    if us is None:
        return
    row["us_per_token"] = us / row["batch"]
    row["gflops"] = row["flops"] / us * 1e-3
    row["gb_per_s"] = row["bytes_read"] / us * 1e-3
    if roofline is None:
        return
    compute = {row["computes_in"]: row["flops"]}
    bytes_from = {weight_level(row["weight_bytes"]): row["bytes_read"]}
    bytes_from["L1"] = bytes_from.get("L1", 0.0) + row.get("row_bytes", 0.0)
    if row["cache"] == "fresh":
        bytes_from["memory"] = bytes_from.get("memory", 0.0) + row["batch"] * row["token_bytes"]
    known = {level: size for level, size in bytes_from.items() if level in roofline.gb_per_s}
    least, bound = roofline.bound(compute, known)
    row["roofline_fraction"], row["bound"] = least / us, bound


def weight_level(weight_bytes: float, found: Sequence[dict[str, Any]] | None = None) -> str:
    """Name the nearest cache that holds all the weights a contender cycles through, or "memory"."""
    for cache in caches() if found is None else found:
        if cache["level"] != "L1i" and weight_bytes <= cache["bytes"]:
            return cache["level"].rstrip("d")
    return "memory"
