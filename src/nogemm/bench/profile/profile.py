"""`nogemm profile`: where a layer's time goes, what it makes the machine do, and how far that is from what it can do.

LookupFFN's table 6 for any layer: time of its phases, multiply-add utilisation, bandwidth of every level, miss rates;
beside it a roofline of every instruction set. Times are measured by the rules of `bench layer`;
events come from hardware counters, else from valgrind (`simulate.py`), and the result says from which.

Reading order: `ProfileArgs`, `run_profile`; rows and points are made in `rows.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nogemm.bench import peers
from nogemm.bench.contenders.layer import our_layer
from nogemm.bench.engine.measure import Plan, Spec, measure
from nogemm.bench.engine.pool import pool_size, write_pool
from nogemm.bench.engine.result import origin, our_names
from nogemm.bench.engine.row import Row
from nogemm.bench.layer import LayerBenchArgs, checked, token_source
from nogemm.bench.profile import counting
from nogemm.bench.profile.counting import DENSE
from nogemm.bench.profile.counts import Counts, from_dict, from_events
from nogemm.bench.profile.job import FIRST, WHOLE
from nogemm.bench.profile.rows import phase_rows, roofline_points
from nogemm.bench.profile.simulate import geometry, why_no_simulator
from nogemm.errors import ConfigError, NativeError
from nogemm.files import parse_json
from nogemm.hardware.counters import why_no_counters
from nogemm.hardware.roofline import Roofline, measure_rooflines
from nogemm.layers import PackedFFN
from nogemm.layers._base import Kernel
from nogemm.running.partial import Keep

COUNTERS = ("auto", "perf", "cachegrind", "none")
_NOT_NATIVE = "this layer is several torch operators: only hardware counters can count it"
_KEY = ("contender", "phase", "batch")
Note = Callable[[str], None]
Key = tuple[str, str, int]


@dataclass(frozen=True, kw_only=True)
class ProfileArgs:
    """Say which layer is profiled and where its events come from.

    Attributes:
        layer: as for `bench layer`; one dtype, always fresh tokens.
        counters: "perf" (hardware), "cachegrind" (simulated), "none", or "auto": the first of them that works here.
        counts: an earlier result of the same layer whose events are taken; batches that it lacks are counted. Simulated
            events do not depend on the clock, and take minutes.
        project: also fit a model of the time and run it on other machines and shapes.
    """

    layer: LayerBenchArgs = field(default_factory=LayerBenchArgs)
    counters: str = "auto"
    counts: str | None = None
    project: bool = False


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a paper draws from a profile, and this package does not: `nogemm_papers.projected.FIGURES` of a checkout.

    Attributes:
        energy: estimates the accesses' energy from counts by (contender, phase, batch).
        check_projectable: raises ConfigError for a layer that `project` does not know.
        project: from the layer, its rows, the machine's roofline and fresh tokens.
    """

    energy: Callable[[Mapping[Key, Counts]], dict[str, Any]]
    check_projectable: Callable[[LayerBenchArgs], object]
    project: Callable[[LayerBenchArgs, Sequence[Mapping[str, Any]], Roofline, Path, Note], dict[str, Any]]


def run_profile(
    args: ProfileArgs, *, figures: Figures | None = None, note: Note | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Time a packed layer by phases, count its events, and hold both against the machine; `keep` gets it in steps.

    Returns:
        `origin` and {"phases", "rooflines", "counting", "rows", "points", "counts", "energy" (None without `figures`),
        "projection" (None unless asked for)}; see docs/guides/profile.md. A row has "contender", "phase", "batch",
        "us_median" and the rates of `counts.rates`; what is not known is None, and "why_not" says why.
    Raises:
        ConfigError, ValueError: as `run_layer_bench`, an unknown source, counts of another layer, or a projection
            without `figures`.
        NativeError: a source that was asked for by name and does not work here.
    """
    say = note or (lambda line: None)
    layer = checked(args.layer)
    ours = _one_name(layer)
    settings = asdict(layer) | {"ours": ours, "counters": args.counters}
    if args.project:
        if figures is None:
            raise ConfigError("project: the paper's figures are not here; pass `figures`")
        figures.check_projectable(layer)
    chosen = choose_source(args.counters)
    earlier = {} if args.counts is None else _read_counts(Path(args.counts), settings)
    head = origin(settings)
    say("rooflines")
    rooflines = measure_rooflines(layer.threads)
    packed = our_layer(_shape(layer)).pack(layer.dtype)
    known = packed.kernel
    names = known.phases if known is not None else None
    roofline = rooflines.get(head["isa"])
    size = pool_size(layer.d, largest_call=max(layer.batch) * 2, cap_bytes=layer.pool_cap_bytes)
    head |= {
        "phases": None if names is None else list(names),
        "rooflines": {isa: found.to_dict() for isa, found in rooflines.items()},
        "pool": size.to_dict(),
    }

    def finished(
        timed: list[Row], counted: Mapping[Key, Counts], how: dict[str, Any], projection: Any
    ) -> dict[str, Any]:
        rows = phase_rows(timed, ours, names, counted, roofline, how)
        return head | {
            "counting": how,
            "rows": rows,
            "points": roofline_points(rows, counted, roofline),
            "counts": [dict(zip(_KEY, key, strict=True)) | counts.to_dict() for key, counts in counted.items()],
            "energy": None if figures is None else figures.energy(counted),
            "projection": projection,
        }

    def kept(timed: list[Row], projection: Any = None) -> None:
        if keep is not None:
            keep(finished(timed, {}, {"source": None, "why_not": "not reached"}, projection))

    with tempfile.TemporaryDirectory(prefix="nogemm-profile-") as folder:
        pool = Path(folder) / "tokens"
        write_pool(pool, size.tokens, layer.d, seed=layer.seed + 1, source_ND=token_source(layer))
        specs = profile_specs(layer, ours, pool, packed, events=chosen.name == "perf")
        plan = Plan(threads=layer.threads, rounds=layer.rounds, seconds=layer.seconds)
        cases = [{"batch": batch, "cache": "fresh"} for batch in layer.batch]
        timed = measure(specs, cases, plan, note=note, keep=kept)
        projection = None
        if args.project and figures is not None and roofline is not None:
            rows = phase_rows(timed, ours, names, {}, roofline, {"source": None, "why_not": ""})
            projection = figures.project(layer, rows, roofline, pool, say)
            kept(timed, projection)
    if chosen.name == "perf":
        counted, how = _events(timed, ours, known), {"source": "perf", "why_not": "", "threads": layer.threads}
    else:
        counted, how = _count(layer, ours, packed, chosen, earlier, say)
    return finished(timed, counted, how, projection)


@dataclass(frozen=True)
class Source:
    """Where events come from: "perf", "cachegrind" or None; and why not from elsewhere."""

    name: str | None
    why_not: str


def choose_source(wanted: str) -> Source:
    """Choose where events come from.

    Raises:
        ConfigError: an unknown source.
        NativeError: one that was asked for by name and does not work here.
    """
    if wanted not in COUNTERS:
        raise ConfigError(f"--counters must be one of {', '.join(COUNTERS)}, got {wanted!r}")
    reasons = []
    for source, ask in (("perf", why_no_counters), ("cachegrind", why_no_simulator)):
        if wanted in ("auto", source):
            reason = ask()
            if reason is None:
                return Source(source, "; ".join(reasons))
            reasons.append(f"{source}: {reason}")
    if wanted in ("perf", "cachegrind"):
        raise NativeError(f"--counters {wanted}: {reasons[0].partition(': ')[2]}")
    return Source(None, "; ".join(reasons) or "not asked for")


def profile_specs(layer: LayerBenchArgs, ours: str, pool: Path, packed: PackedFFN, *, events: bool) -> list[Spec]:
    """Return the contenders: our module, its kernel and first phase where it has them, and dense layers."""
    known = packed.kernel
    # A layer with a kernel answers by it, whatever else would be quicker: the kernel is what is looked at.
    common = _shape(layer) | {"pool": str(pool), "events": events, "path": layer.path if known is None else "rows"}
    job = "nogemm.bench.profile.job"
    specs = [Spec(name=ours, factory=f"{job}:CallContender", settings=common)]
    if known is not None:
        settings = common | {"phase": WHOLE}
        specs.append(Spec(name=f"{ours} kernel", factory=f"{job}:PhaseContender", settings=settings))
    if known is not None and known.phases is not None:
        factory = f"{job}:{'PhaseContender' if known.stops else 'SketchContender'}"
        settings = common | {"phase": FIRST}
        specs.append(Spec(name=f"{ours} {known.phases[0]}", factory=factory, settings=settings))
    for name in layer.against:
        settings = common | {"engine": name}
        specs.append(Spec(name=name, factory=f"{job}:CountedDense", settings=settings, missing=peers.missing(name)))
    return specs


def _count(
    layer: LayerBenchArgs, ours: str, packed: PackedFFN, chosen: Source, earlier: Mapping[Key, Counts], say: Note
) -> tuple[dict[Key, Counts], dict[str, Any]]:
    """Simulate what no earlier result holds; return counts by (contender, phase, batch), and how they were made."""
    if chosen.name is None:
        return dict(earlier), {"source": None, "why_not": chosen.why_not}
    g = geometry()
    how = {**counting.describe(layer.batch, g), "why_not": chosen.why_not}
    if packed.kernel is None:
        return dict(earlier), how | {"not_native": _NOT_NATIVE}
    batches = [batch for batch in layer.batch if (ours, "kernel", batch) not in earlier]
    counted = dict(earlier)
    if batches:
        source_ND = token_source(layer)
        counted |= counting.simulate_phases(
            packed, ours, batches, g, source_ND=source_ND, seed=layer.seed + 1, note=say
        )
    batches = [batch for batch in layer.batch if (DENSE, "kernel", batch) not in earlier]
    if batches and layer.against and not layer.gated:
        counted |= counting.simulate_dense(layer.d, layer.hidden, batches, g, say)
    return counted, how


def _events(timed: Sequence[Mapping[str, Any]], ours: str, known: Kernel | None) -> dict[Key, Counts]:
    found: dict[Key, Counts] = {}
    for row in timed:
        if "events" in row:
            name, _, phase = row["contender"].partition(" ")
            found[name, phase or "whole", row["batch"]] = from_events(row["events"], 1.0)
    names = known.phases if known is not None else None
    for batch in {row["batch"] for row in timed}:
        whole, kernel = found.get((ours, "whole", batch)), found.get((ours, "kernel", batch))
        if whole is not None and kernel is not None:
            found[ours, "rest", batch] = whole - kernel
        if kernel is not None and names is not None and (ours, names[0], batch) in found:
            found[ours, names[1], batch] = kernel - found[ours, names[0], batch]
    return found


def _read_counts(path: Path, settings: Mapping[str, Any]) -> dict[Key, Counts]:
    """Read the simulated counts of an earlier result.

    Raises:
        ConfigError: not a profile, or of another layer; the message names the first setting that differs.
    """
    data = parse_json(path.read_text())
    if data.get("kind") != "profile" or data["counting"]["source"] != "cachegrind":
        raise ConfigError(f"--counts {path}: not a profile with simulated counts")
    for name in ("method", "set", "d", "hidden", "activation", "gated", "dtype", "checkpoint", "site", "seed"):
        wanted, its = json.loads(json.dumps(settings[name])), data["settings"][name]
        if (sorted(its) != sorted(wanted)) if name == "set" else (its != wanted):
            raise ConfigError(f"--counts {path}: its {name} is {its!r}, not {wanted!r}")
    found: dict[Key, Counts] = {}
    for entry in data["counts"]:
        values = {name: value for name, value in entry.items() if name not in _KEY}
        found[entry["contender"], entry["phase"], entry["batch"]] = from_dict(values)
    return found


def _one_name(layer: LayerBenchArgs) -> str:
    names = our_names(layer.dtype)
    if len(names) != 1:
        raise ConfigError(f"--dtype must be one of fp32, bf16, int8 for a profile, got {layer.dtype!r}")
    return names[0]


def _shape(layer: LayerBenchArgs) -> dict[str, Any]:
    kept = ("method", "d", "hidden", "activation", "gated", "dtype", "checkpoint", "site", "seed")
    return {name: getattr(layer, name) for name in kept} | {"set": list(layer.set)}
