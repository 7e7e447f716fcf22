"""`nogemm profile --sparsity`: which FFNs of a model are sparse, what that would save, and what it costs in quality.

Reading order: `SparsityOptions`, `profile_sparsity`, `run_sparsity`; one FFN's figures are made in `layer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.bench.engine.measure import MIN_ROUNDS, Plan
from nogemm.bench.engine.result import DTYPES, origin
from nogemm.bench.sparsity.layer import SKETCHES, Found, describe, kept_count
from nogemm.bench.sparsity.quality import ADDED, Judge, cut, judge_of
from nogemm.bench.sparsity.samples import as_it_was, find_tokenizer, read_samples, site_inputs
from nogemm.bench.sparsity.speed import measure_speed, predictions
from nogemm.config import check_int
from nogemm.convert.activations import Sample
from nogemm.convert.sites import Site, survey
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import usable_cores
from nogemm.hardware.roofline import measure_roofline
from nogemm.layers.hire.config import SketchKind
from nogemm.models.inner import inner_model
from nogemm.models.loading import load_both
from nogemm.running.measured import Keep, Note

ALONE_TOKENS = 256  # on which the model is judged with one FFN cut


@dataclass(frozen=True, kw_only=True)
class SparsityOptions:
    """Say what is measured.

    Attributes:
        keep: shares of the neurons that are to answer.
        sketches: that name candidates; the first is the one that is timed.
        tokens: of the data, at least one.
        batch: tokens of a call, whose unions are counted and whose time is predicted.
        timed: those of which the time is measured; () for none.
        dtype: of the layers that are timed: "fp32", "bf16" or "int8".
        quality: judge the model with its neurons cut, all layers at once.
        layerwise: and one layer at a time, at the first share: as many passes over 256 tokens as there are FFNs.
        threads, rounds, seconds: as in `nogemm bench layer`.
        seed: of what is drawn: texts, masked tokens.
    """

    keep: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)
    sketches: tuple[SketchKind, ...] = SKETCHES
    tokens: int = 2048
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    timed: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    dtype: str = "fp32"
    quality: bool = True
    layerwise: bool = False
    threads: int = 0
    rounds: int = MIN_ROUNDS
    seconds: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("keep", "sketches", "batch", "timed"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ConfigError(f"{name} must be a tuple, got {name}={value!r}")
            if name != "timed" and not value:
                raise ConfigError(f"{name} is empty")
            if len(set(value)) != len(value):
                raise ConfigError(f"{name} names one value twice: {name}={value!r}")
        for share in self.keep:
            number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not number or not math.isfinite(share) or not 0 < share <= 1:
                raise ConfigError(f"keep: shares must be above 0 and at most 1, got {share!r}")
        for kind in self.sketches:
            if kind not in SKETCHES:
                raise ConfigError(f"sketches must be of {', '.join(SKETCHES)}, got {kind!r}")
        for name in ("batch", "timed"):
            for size in getattr(self, name):
                check_int("SparsityOptions", name, size, 1)
        check_int("SparsityOptions", "tokens", self.tokens, 1)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


def profile_sparsity(
    model: nn.Module,
    data: str | Path | Iterable[Sample],
    options: SparsityOptions | None = None,
    *,
    tokenizer: Any = None,
    note: Note | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Measure how sparse the dense FFNs of a model are on texts; the model is left exactly as it was.

    Of every FFN: the share of exact zeros, how few neurons carry its output, the energy of the output that the
    strongest neurons give, how many candidates a sketch must name for a recall, and how many distinct neurons tokens
    touch together. Of every shape: HiRE's time beside the dense layer's, predicted and measured. Of the model:
    perplexity, pseudo-perplexity or agreement, before and with the neurons cut.

    Args:
        model: of transformers, or a SentenceTransformer; any whose FFNs `nogemm.sites` lists.
        data: "sample", a file of texts, or an iterable of texts and of mappings of the model's keyword arguments.
        options: see `SparsityOptions`.
        tokenizer: for texts; default: the one stored with the model.
        note: called with a line of progress.
        keep: called with the result as it grows.
    Returns:
        JSON values; docs/guides/sparsity.md has the fields.
    Raises:
        ConfigError: the model has no dense FFN that nogemm reads, cannot run on the data, or the data has too few
            tokens; an option that cannot be used.
        DataError: no such file, or no text in it.
        NotFiniteError: an FFN's input is NaN or infinite.
    Cost: two passes over the tokens for every share of `keep`, with `layerwise` one over 256 tokens for every FFN; per
        FFN and sketch the scores of all neurons and a sort of them; about a minute for every shape that is timed.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"profile_sparsity: expected a model, got {model!r:.60}; load it first")
    options = options or SparsityOptions()
    say = note or (lambda line: None)
    tokenizer = find_tokenizer(model) if tokenizer is None else tokenizer
    head = origin(asdict(options) | {"threads": options.threads or usable_cores()})
    # Layers are built on the way, and draw weights that are then overwritten: the caller's random numbers stay.
    with as_it_was(model), torch.random.fork_rng(devices=[]):
        sites, left_out = _readable(model)
        samples = read_samples(model, data, tokenizer, options.tokens)
        head |= {"model": type(inner_model(model)).__name__, "tokens": samples.tokens, "left_out": left_out}
        head |= {"weights": str(sites[0].placement()[1]).removeprefix("torch.")}
        state: dict[str, Any] = {"layers": [], "quality": None, "predicted": [], "speed": []}

        def kept() -> None:
            if keep is not None:
                keep(head | {**state, "layers": list(state["layers"])})

        say(f"inputs of {len(sites)} FFNs on {samples.tokens:,} tokens")
        inputs = site_inputs(model, sites, samples)
        kinds = _kinds(sites)
        timed = _describe(sites, inputs, [same[len(same) // 2] for same in kinds], options, state, say, kept)
        if options.quality:
            say("quality of the dense model")
            _judge(sites, judge_of(model, samples, tokenizer, options.seed), options, state, say, kept)
            if options.layerwise and state["quality"]["measure"] is not None:
                few = judge_of(model, samples.first(ALONE_TOKENS), tokenizer, options.seed)
                _judge_alone(sites, few, options, state, say, kept)
        for same in kinds:
            site = same[len(same) // 2]
            _time(site, len(same), timed[site.name], inputs[site.name][0], options, state, say)
            kept()
    return head | state


def run_sparsity(
    path: str,
    data: str,
    options: SparsityOptions,
    *,
    trust_remote_code: bool = False,
    note: Note | None = None,
    keep: Keep | None = None,
) -> dict[str, Any]:
    """Load a model and measure it; the settings name model and data without their folders.

    Raises:
        CheckpointError, ConfigError, DataError: as `load_model` and `profile_sparsity`.
    """
    (note or (lambda line: None))(f"loading {Path(path).name}")
    model, tokenizer = load_both(path, trust_remote_code=trust_remote_code)
    named = {"model": Path(path).name, "data": Path(data).name}

    def with_names(result: dict[str, Any]) -> dict[str, Any]:
        return result | {"settings": named | result["settings"]}

    kept = None if keep is None else lambda result: keep(with_names(result))
    return with_names(profile_sparsity(model, data, options, tokenizer=tokenizer, note=note, keep=kept))


def _readable(model: nn.Module) -> tuple[list[Site], list[dict[str, str]]]:
    """List the sites whose neurons can be computed, and the others with the reason."""
    found = survey(model)
    others = [{"site": one.name, "why": one.reason} for one in (*found.blocked, *found.refused)]
    sites = []
    for site in found.open:
        if site.activation in ACTIVATIONS:
            sites.append(site)
        else:
            others.append({"site": site.name, "why": f"the activation {site.activation!r} is not known"})
    if not sites:
        reasons = "; ".join(f"{one['site']}: {one['why']}" for one in others[:3])
        raise ConfigError(
            f"{type(inner_model(model)).__name__} has no dense FFN that can be profiled"
            + (f" ({reasons})" if reasons else "")
        )
    return sites, others


def _kinds(sites: Sequence[Site]) -> list[list[Site]]:
    """Group sites by shape, in model order."""
    kinds: dict[Any, list[Site]] = {}
    for site in sites:
        kinds.setdefault(site.shape, []).append(site)
    return list(kinds.values())


def _describe(
    sites: Sequence[Site],
    inputs: Mapping[str, tuple[Tensor, list[int]]],
    chosen: Sequence[Site],
    options: SparsityOptions,
    state: dict[str, Any],
    say: Note,
    kept: Callable[[], None],
) -> dict[str, Found]:
    """Measure every FFN; return what timing needs of the chosen ones."""
    timed = {}
    for site in sites:
        say(f"{site.name}: neurons")
        found = describe(
            site,
            *inputs[site.name],
            keep=options.keep,
            sketches=options.sketches,
            batch=options.batch,
            seed=options.seed,
        )
        state["layers"].append(found.row)
        if site in chosen:
            timed[site.name] = found
        kept()
    return timed


def _judge(
    sites: Sequence[Site],
    judge: Judge | str,
    options: SparsityOptions,
    state: dict[str, Any],
    say: Note,
    kept: Callable[[], None],
) -> None:
    """Judge the model with all FFNs cut, by both rankings."""
    if isinstance(judge, str):
        state["quality"] = {"measure": None, "why_not": judge}
        return
    quality: dict[str, Any] = {"measure": judge.measure, "higher": judge.higher, "tokens": judge.tokens}
    quality |= {"dense": judge.dense, "cut": []}
    state["quality"] = quality
    for share in options.keep:
        say(f"{judge.measure} with {share:.0%} of all neurons")
        with cut(sites, lambda site, share=share: kept_count(site.hidden, share)):
            value = judge.value()
        with cut(sites, lambda site, share=share: kept_count(site.hidden, share), ADDED):
            best = judge.value()
        quality["cut"].append({"keep": share, "value": value, "best": best})
        kept()


def _judge_alone(
    sites: Sequence[Site],
    judge: Judge | str,
    options: SparsityOptions,
    state: dict[str, Any],
    say: Note,
    kept: Callable[[], None],
) -> None:
    """Judge the model with one FFN cut at a time, on fewer tokens: there are as many passes as FFNs."""
    if isinstance(judge, str):
        return
    state["quality"]["alone"] = {"keep": options.keep[0], "dense": judge.dense, "tokens": judge.tokens}
    for site, row in zip(sites, state["layers"], strict=True):
        say(f"{judge.measure} with {options.keep[0]:.0%} of the neurons of {site.name}")
        with cut([site], lambda site: kept_count(site.hidden, options.keep[0])):
            row["alone"] = judge.value()
        kept()


def _time(
    site: Site, count: int, found: Found, x_ND: Tensor, options: SparsityOptions, state: dict[str, Any], say: Note
) -> None:
    """Predict and measure the time of one shape."""
    about = {"site": site.name, "sites": count}
    if site.d_in != site.d_out:
        state["speed"].append({**about, "rows": [], "why_not": "its output is not as wide as its input"})
        return
    threads = options.threads or usable_cores()
    say(f"{site.name}: roofline")
    roofline = measure_roofline(threads)
    if roofline is not None:
        rows = predictions(site, found, roofline, dtype=options.dtype, batch=options.batch)
        state["predicted"].append({**about, "roofline": roofline.to_dict(), "rows": rows})
    if options.timed:
        plan = Plan(threads=threads, rounds=options.rounds, seconds=options.seconds)
        rows = measure_speed(
            site, found, x_ND, dtype=options.dtype, batch=options.timed, plan=plan, seed=options.seed, note=say
        )
        state["speed"].append({**about, "rows": rows})
