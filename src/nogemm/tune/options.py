"""Every choice of a search, in one frozen dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nogemm.bench import peers
from nogemm.bench.engine.measure import MIN_ROUNDS
from nogemm.config import LayerConfig, layer_config
from nogemm.errors import ConfigError
from nogemm.tune.offers import OFFERS, Offers, check_offers

BUDGETS = ("quality", "latency_ms", "memory_mb")
FLAGS = {"quality": "--quality", "latency_ms": "--latency", "memory_mb": "--memory"}
RIVALS = ("torch-fp32", "torch-int8", "onnxruntime-int8", "openvino-f32", "openvino-int8")
ENGINES = tuple(name for name in peers.CONTENDERS if not name.startswith("inductor"))


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What `tune` searches, and how long.

    Attributes:
        quality: the least agreement with the dense model, in (0, 1]; the fastest model that reaches it is wanted.
        latency_ms: the most milliseconds of a call; the best agreement within it is wanted.
        memory_mb: the most megabytes (10^6 bytes) of stored weights; the best agreement within it is wanted.
        engine: that runs the candidates, such as "openvino-int8"; None: the fastest of `rivals` for the dense model.
        max_seconds: of the whole search, all its sessions together.
        shape: (texts, tokens of each) of the call that is timed.
        offers: what may stand in an FFN's place: names of `nogemm.tune.OFFERS`, or {name: config}; None: all of those.
        rivals: engines that run the dense model beside the candidates.
        static: also make a static embedding by model2vec, the end without arithmetic.
        shortlist: candidates that are distilled for a short time.
        short_tokens, tokens: of a short and of a full distillation; None: what the time allows.
        fit_tokens: about so many tokens of text are used in closed-form fits.
        evidence_texts: that an untrained model's agreement is measured on.
        validation_texts, test_texts: held out of the data, at most a tenth of it each.
        checked: whole candidates that the additive models are checked on.
        rounds, seconds, threads: of timing, as in `nogemm bench layer`.
        field: of JSONL or CSV rows that holds the text; None tries the usual names.
        distil: choices of `DistilOptions` that override those of the search, for every candidate and rival.
        seed: of the order of the data and of what starts at random.
    """

    quality: float | None = None
    latency_ms: float | None = None
    memory_mb: float | None = None
    engine: str | None = None
    max_seconds: float = 3600.0
    shape: tuple[int, int] = (1, 128)
    offers: tuple[str, ...] | Mapping[str, LayerConfig] | None = None
    rivals: tuple[str, ...] = RIVALS
    static: bool = True
    shortlist: int = 8
    short_tokens: int | None = None
    tokens: int | None = None
    fit_tokens: int = 6_000
    evidence_texts: int = 64
    validation_texts: int = 300
    test_texts: int = 1_000
    checked: int = 3
    rounds: int = MIN_ROUNDS
    seconds: float = 0.1
    threads: int = 0
    field: str | None = None
    distil: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            said = "none was given" if not given else f"got {', '.join(f'{n}={getattr(self, n)!r}' for n in given)}"
            raise ConfigError(
                f"tune: give one budget: quality, latency_ms or memory_mb (--quality, --latency or --memory); {said}"
            )
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"tune: {name} must be a number from {low:g} to {high:g}, got {name}={value!r}")
        for name in (*self.rivals, *(() if self.engine is None else (self.engine,))):
            if name not in ENGINES:
                raise ConfigError(f"tune: engine must be one of {', '.join(ENGINES)}, got {name!r}")
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ConfigError(f"tune: shape must be (texts, tokens of each), got {self.shape!r}")
        for fixed in ("tokens", "hidden_map", "max_seconds", "seed"):
            if fixed in self.distil:
                raise ConfigError(f"tune: distil may not set {fixed}: the search chooses it")
        self.offered()

    @property
    def budget(self) -> tuple[str, float]:
        """The budget's name and value."""
        return next((name, float(value)) for name in BUDGETS if (value := getattr(self, name)) is not None)

    @property
    def budget_words(self) -> str:
        """The budget as the command line writes it."""
        name, value = self.budget
        return f"{FLAGS[name]} {value:g}"

    def offered(self) -> Offers | None:
        """Return the named offers, {name: config}; None: all that fit the model.

        Raises:
            ConfigError: an unknown name, or something else than a layer config.
        """
        if self.offers is None:
            return None
        if isinstance(self.offers, Mapping):
            for name, config in self.offers.items():
                if not isinstance(config, LayerConfig):
                    raise ConfigError(f"tune: offers[{name!r}] must be a layer config, got {config!r}")
            check_offers(self.offers)
            return dict(self.offers)
        unknown = [name for name in self.offers if name not in OFFERS]
        if unknown or not self.offers:
            raise ConfigError(f"tune: offers must be of {', '.join(OFFERS)}, got {', '.join(unknown) or 'none'}")
        return {name: OFFERS[name] for name in self.offers}

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if isinstance(self.offers, Mapping):
            found["offers"] = {name: config.to_dict() for name, config in self.offers.items()}
        return {name: _plain(value) for name, value in found.items()}


def tune_options(**given: Any) -> TuneOptions:
    """Make options of words, such as a command line's.

    Raises:
        ConfigError: no such option, or a value out of range.
    """
    known = [field.name for field in dataclasses.fields(TuneOptions)]
    for name in given:
        if name not in known:
            raise ConfigError(f"tune has no option {name!r}; it has: {', '.join(known)}")
    for name in ("shape", "offers", "rivals"):
        if isinstance(given.get(name), list):
            given[name] = tuple(given[name])
    offers = given.get("offers")
    if isinstance(offers, Mapping):
        given["offers"] = {
            name: layer_config(dict(config)) if isinstance(config, Mapping) else config
            for name, config in offers.items()
        }
    return TuneOptions(**given)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("quality", 1e-6, 1.0),
    ("latency_ms", 1e-9, 1e9),
    ("memory_mb", 1e-9, 1e9),
    ("max_seconds", 1, 1e9),
    ("shortlist", 1, 1000),
    ("short_tokens", 1, 1e15),
    ("tokens", 1, 1e15),
    ("fit_tokens", 16, 1e9),
    ("evidence_texts", 2, 1e6),
    ("validation_texts", 2, 1e6),
    ("test_texts", 2, 1e6),
    ("checked", 0, 100),
    ("rounds", 1, 1000),
    ("seconds", 0, 1000),
    ("threads", 0, 4096),
    ("seed", 0, 2**31),
)
