"""`nogemm bench model`: a whole converted model beside the dense one, in every engine asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nogemm.bench import peers
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan, Spec, add_ratios, measure
from nogemm.bench.engine.result import origin, our_names
from nogemm.bench.engine.row import Row, fill
from nogemm.bench.models import is_published_shape
from nogemm.config import parse_layer
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import usable_cores
from nogemm.models.directory import PACKAGED, model_directory
from nogemm.running.partial import Keep

_KEYS = ("batch", "length")
REMOVED = "no-ffn+"
CUT = "-layers+"
COMPILED = "+inductor"
EXPORTED = "openvino-"


@dataclass(frozen=True, kw_only=True)
class ModelBenchArgs:
    """Say which model is timed, at which shapes and against whom.

    Attributes:
        dense: directory of the dense model, or all-MiniLM-L6-v2; bert-base and roberta-base are made with random
            weights, for their time alone.
        model: directory of the converted model; None converts the dense one by `method` and `set` with random weights.
        method, set: as in `nogemm bench layer`; unused with `model`.
        dtype: ours is packed in; of several, with commas, the first is the one that ratios are against.
        shape: (texts, tokens per text), one case each.
        against: dense contenders, see `nogemm.bench.peers.CONTENDERS`.
        ceiling: engines that also run the dense model with its FFNs removed, with fewer layers, and the peers.
        layers: numbers of layers; a row for the dense model with so many of its own, not trained further.
        peer: NAME=DIRECTORY of other models that rival the dense one, such as a trained one of fewer layers.
        exported: OpenVINO contenders whose precision ours is also exported to and run in.
        compiled: also time ours under inductor.
        agreement_texts: that every contender is compared with the dense model on, at least; 0: it is not.
        seconds_in_all: nothing new is begun after it, see `nogemm.bench.engine.measure.Plan`; 0: no limit.
        threads, rounds, seconds, seed: as in `nogemm bench layer`.
    """

    dense: str = PACKAGED
    model: str | None = None
    method: str = "lookup"
    set: tuple[str, ...] = ()
    dtype: str = "fp32"
    shape: tuple[tuple[int, int], ...] = ((1, 16), (1, 128), (32, 128))
    against: tuple[str, ...] = peers.CONTENDERS
    ceiling: tuple[str, ...] = ("inductor-fp32", "openvino-int8")
    layers: tuple[int, ...] = ()
    peer: tuple[str, ...] = ()
    exported: tuple[str, ...] = ("openvino-f32", "openvino-int8")
    compiled: bool = True
    agreement_texts: int = 64
    seconds_in_all: float = 0.0
    threads: int = 0
    rounds: int = MIN_ROUNDS
    seconds: float = 0.1
    seed: int = 0


def parse_shape(text: str) -> tuple[int, int]:
    """Read a shape such as "32x128": texts, tokens per text.

    Raises:
        ConfigError: anything else.
    """
    batch, cross, length = text.partition("x")
    if not (cross and batch.isdecimal() and length.isdecimal() and int(batch) and int(length)):
        raise ConfigError(f"--shape {text!r}: expected TEXTSxTOKENS, for example 32x128")
    return int(batch), int(length)


def run_model_bench(
    args: ModelBenchArgs,
    *,
    note: Callable[[str], None] | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Verify and time the packed model, plain, compiled and exported, its dense contenders, and smaller dense models.

    Every call gets the next texts of the packaged sample, cut to the length asked for. A contender's pooled embeddings
    are compared with the fp32 eager model of the same weights before it is timed. `keep` gets the result as it grows.

    Returns:
        `origin` and {"rows"}; a row has "contender", "batch" (texts), "length",
        "codes", "verified", "max_error" (1 - least cosine), "cosine", "us_median", "us_p10", "us_p90" (per call),
        "us_per_token", "ratio" (its median / ours), "memory_bytes" (peak of its process), "agreement" (mean cosine with
        the fp32 dense model on "agreement_texts" texts cut to that length), "trained" (false: random weights, or parts
        of the dense model cut out); or "missing", or "error".
    Raises:
        ConfigError, ValueError: an unknown method, field or contender, or fewer than seven rounds.
    """
    args = _checked(args)
    ours = our_names(args.dtype)[0]
    head = origin(asdict(args) | {"ours": ours})
    codes = "uniform" if args.model is None else "trained"
    cases = [{"batch": batch, "length": length, "cache": "fresh", "codes": codes} for batch, length in args.shape]
    plan = Plan(
        threads=args.threads,
        rounds=args.rounds,
        seconds=args.seconds,
        seconds_in_all=args.seconds_in_all or float("inf"),
    )

    def finished(rows: list[Row]) -> dict[str, Any]:
        add_ratios(rows, ours, _KEYS)
        for row in rows:
            row["trained"] = _is_trained(row["contender"], args)
            us = row.get("us_median")
            fill(row, ("us_median", "us_p10", "us_p90", "max_error"))
            row["us_per_token"] = None if us is None else us / (row["batch"] * row["length"])
        return head | {"rows": rows}

    def kept(rows: list[Row]) -> None:
        if keep is not None:
            keep(finished(rows))

    return finished(measure(_specs(args), cases, plan, note=note, keep=kept))


def _checked(args: ModelBenchArgs) -> ModelBenchArgs:
    our_names(args.dtype)
    if not args.shape or min(min(shape) for shape in args.shape) < 1:
        raise ConfigError(f"--shape needs at least one pair of positive numbers, got {args.shape}")
    parse_layer(args.method, args.set)
    for name in (*args.against, *args.ceiling, *args.exported):
        peers.missing(name)
    if is_published_shape(args.dense) and args.model is not None:
        raise ConfigError(f"--dense {args.dense} has random weights, so --model {args.model} was not converted from it")
    peer_directories(args.peer)
    for name in args.exported:
        if not name.startswith(EXPORTED):
            raise ConfigError(f"--exported {name}: ours is exported to OpenVINO alone: openvino-f32, -bf16 or -int8")
    return replace(args, threads=args.threads or usable_cores())


def _specs(args: ModelBenchArgs) -> list[Spec]:
    base = {"dense": args.dense, "seed": args.seed, "agreement_texts": args.agreement_texts}
    ours = base | {"model": args.model, "method": args.method, "set": list(args.set)}
    factory = "nogemm.bench.contenders.model:OurModelContender"
    specs = [
        Spec(
            name=f"{name}{COMPILED if compiled else ''}",
            factory=factory,
            settings=ours | {"compiled": compiled, "dtype": name.partition("-")[2]},
            missing=peers.missing("inductor-fp32") if compiled else None,
        )
        for name in our_names(args.dtype)
        for compiled in ((False, True) if args.compiled else (False,))
    ]
    specs += [
        Spec(
            name=f"{name}+{host}",
            factory="nogemm.bench.contenders.model:ExportedModelContender",
            settings=ours | {"dtype": name.partition("-")[2], "rest": host.removeprefix(EXPORTED)},
            missing=peers.missing(host),
        )
        for name in our_names(args.dtype)
        for host in args.exported
    ]
    variants: list[tuple[str, dict[str, Any]]] = [(REMOVED, {"removed": True})]
    variants += [(f"{count}{CUT}", {"layers": count}) for count in args.layers]
    variants += [(f"{name}+", {"peer": path}) for name, path in peer_directories(args.peer).items()]
    dense = [(name, base | {"engine": name}) for name in args.against]
    dense += [(f"{label}{name}", base | {"engine": name} | what) for label, what in variants for name in args.ceiling]
    factory = "nogemm.bench.contenders.model:DenseModelContender"
    specs += [
        Spec(name=label, factory=factory, settings=settings, missing=peers.missing(settings["engine"]))
        for label, settings in dense
    ]
    return specs


def peer_directories(words: Sequence[str]) -> dict[str, str]:
    """Read NAME=DIRECTORY of models that rival the dense one.

    Raises:
        ConfigError: another form, a name given twice, or a directory without a model.
    """
    found: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        ours = f"{name}+" == REMOVED or f"{name}+".endswith(CUT) or name.startswith("nogemm-")
        if not (name and equals and path) or "+" in name or ours or name in found:
            raise ConfigError(f"--peer {word!r}: expected NAME=DIRECTORY, each a name of its own without a plus")
        found[name] = model_directory(path)
    return found


def _is_trained(contender: str, args: ModelBenchArgs) -> bool:
    """Say whether a row's weights are those of a given checkpoint; a cut or random model's quality says nothing."""
    name, _, engine = contender.partition("+")
    if contender.startswith("nogemm-"):
        return args.model is not None
    if engine and name in peer_directories(args.peer):
        return True
    return not engine and not is_published_shape(args.dense)
