"""The stages before training: the dense model in its engines, single changes, times, whole candidates as a check.

Each keeps its results in the ledger, so that a stopped search goes on behind the last of them.
Reading order: `race`, `evidence`, `latencies`, `whole_candidates`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nogemm.bench import peers
from nogemm.bench.engine.result import why_not
from nogemm.errors import ConfigError
from nogemm.tune.evidence import QualityModel, check, gather
from nogemm.tune.offers import DENSE
from nogemm.tune.search import Costs, fronts, joined
from nogemm.tune.space import Candidate
from nogemm.tune.state import Search
from nogemm.tune.timing import TOGETHER, Entry, LatencyModel, can_run, entry_of, errors, memory_costs

NEAR = 2.0  # a second engine is searched where the dense model takes at most so many times as long
SLACK = 1.1  # a guess above the budget by less may turn out below it


@dataclass
class Known:
    """What the stages before training found.

    Attributes:
        dense: rows of the dense model by engine.
        engines: that are searched, the fastest first.
        evidence: see `gather`.
        quality: guesses losses.
        latency: guesses times, by engine.
        quality_check, latency_check: both, held against whole candidates.
    """

    dense: dict[str, Any]
    engines: list[str]
    evidence: dict[str, Any]
    quality: QualityModel
    latency: dict[str, LatencyModel]
    quality_check: dict[str, Any]
    latency_check: dict[str, Any]

    def engine_for(self, search: Search, candidate: Candidate) -> tuple[str, float] | None:
        """Return the engine that should be fastest for a candidate, and its guessed us; None: none can run it."""
        plain = search.space.plain(candidate)
        found = [
            (model.us(candidate), engine)
            for engine, model in self.latency.items()
            if can_run(engine, plain) and model.knows(candidate)
        ]
        return (min(found)[1], min(found)[0]) if found else None

    def costs(self, search: Search, engine: str) -> Costs:
        """Return the costs that the budget counts."""
        if search.options.memory_mb is not None:
            return memory_costs(search.space, self.evidence, table_bytes(search))
        return self.latency[engine].costs(search.space)

    def limit(self, search: Search) -> float | None:
        """Return the largest cost that the budget allows, in the unit of `costs`; None: the budget is quality."""
        name, value = search.options.budget
        return {"quality": None, "latency_ms": 1e3 * value, "memory_mb": 1e6 * value}[name]


def dense_name(engine: str) -> str:
    """Name the dense model's row."""
    return f"dense, {engine}"


def race(search: Search) -> tuple[dict[str, Any], list[str]]:
    """Time and score the dense model in every engine; return its rows by engine, and the engines to search in.

    Raises:
        ConfigError: the engine asked for is not installed or does not run the model.
    """
    options = search.options
    if options.engine is not None and (reason := peers.missing(options.engine)) is not None:
        raise ConfigError(f"tune: --engine {options.engine}: {reason}")
    names = list(dict.fromkeys((*((options.engine,) if options.engine else ()), *options.rivals)))
    search.note("timing the dense model in every engine")
    entries = [Entry(name=dense_name(name), engine=name) for name in names]
    rows = search.time("dense", "rows", entries, scored=True)
    found = {name: rows[dense_name(name)] for name in names}
    timed = {name: row["us_median"] for name, row in found.items() if row.get("us_median") is not None}
    if options.engine is not None:
        if options.engine not in timed:
            reason = why_not(found[options.engine])
            raise ConfigError(f"tune: --engine {options.engine} does not run this model: {reason}")
        return found, [options.engine]
    if not timed:
        reasons = "; ".join(f"{name}: {why_not(row)}" for name, row in found.items())
        raise ConfigError(f"tune: no engine runs the dense model: {reasons}")
    order = sorted(timed, key=lambda name: timed[name])
    return found, [name for name in order[:2] if timed[name] <= NEAR * timed[order[0]]]


def evidence(search: Search) -> tuple[dict[str, Any], QualityModel]:
    """Measure every single change; keep the models with one offer everywhere, to be timed."""
    space = search.space

    def save(offer: str, model: Any) -> None:
        search.store(model, space.uniform(offer))

    found = gather(space, search.judge, search.ledger, search.note, save)
    alone = {name: entry["alone"] for name, entry in found["offers"].items()}
    return found, QualityModel(found["dropped"], alone)


def latencies(search: Search, engines: Sequence[str]) -> dict[str, LatencyModel]:
    """Time whole models that differ in one part each, in every engine searched, and fit the parts."""
    found = {}
    for engine in engines:
        timed: list[tuple[Candidate, float]] = []
        chosen = [c for c in samples(search) if can_run(engine, search.space.plain(c))]
        for number, start in enumerate(range(0, len(chosen), TOGETHER)):
            timed += time_group(search, "latency", f"{engine} {number}", chosen[start : start + TOGETHER], engine)
        model = LatencyModel()
        model.fit(timed)
        for candidate in chosen:
            offers = set(candidate.ffns) - {DENSE}
            if not model.knows(candidate) and offers:
                search.notes.append(f"{', '.join(offers)} is not searched in {engine}, which does not run it.")
        found[engine] = model
    for candidate in samples(search):
        search.forget(candidate)
    return found


def samples(search: Search) -> list[Candidate]:
    """Return the models whose times tell the parts apart: every offer everywhere, the dense model in three depths."""
    space = search.space
    found = [space.uniform(name) for name in space.offers]
    if space.droppable and space.depth > 1:
        found += [space.uniform(DENSE, range(count)) for count in {1, (space.depth + 1) // 2} - {space.depth}]
        half = space.uniform(DENSE, range((space.depth + 1) // 2))
        found.append(Candidate(half.kept, half.ffns, tables=True))
    return found


def time_group(
    search: Search, stage: str, key: str, candidates: Sequence[Candidate], engine: str
) -> list[tuple[Candidate, float]]:
    """Time untrained candidates beside the dense model; return (candidate, us), the dense model first.

    Times of one run are put in relation to the dense model's there, and given in those of the first run: what changes
    about the machine between two runs falls out.
    """
    space = search.space
    known = search.first_rows()[dense_name(engine)]["us_median"]

    def work() -> dict[str, Any]:
        entries = [Entry(name=dense_name(engine), engine=engine, scored=False)]
        for candidate in candidates:
            try:
                folder = search.fitted(candidate)
            except ConfigError as error:
                search.note(f"{candidate.name} cannot be built: {error}")
                continue
            entries.append(entry_of(space, candidate, engine, folder))
        return search.runner().time(entries)

    rows: Mapping[str, Any] = search.ledger.take(stage, key, work)
    anchor = rows[dense_name(engine)].get("us_median")
    if anchor is None:
        raise ConfigError(f"tune: the dense model cannot be timed: {why_not(rows[dense_name(engine)])}")
    timed = [(space.whole, known)]
    for candidate in candidates:
        row = rows.get(candidate.name, {})
        if row.get("us_median") is not None:
            timed.append((candidate, row["us_median"] * known / anchor))
        elif row:
            search.notes.append(f"{candidate.name} was not timed in {engine}: {why_not(row)}.")
    return timed


def whole_candidates(search: Search, known: Known) -> None:
    """Hold both additive models against whole candidates of the front; the latency model learns from them, too."""
    engine, space = known.engines[0], search.space
    points = joined(fronts(space, known.latency[engine].costs(space), known.quality))
    mixed = [p.candidate for p in points if len(set(p.candidate.ffns)) > 1 and p.candidate.kept]
    count = min(search.options.checked, len(mixed))
    chosen = [mixed[round((i + 0.5) * len(mixed) / count - 0.5)] for i in range(count)]
    chosen = list(dict.fromkeys(chosen))
    if not chosen:
        return

    def judged(candidate: Candidate) -> float:
        search.note(f"checking {candidate.name}")
        model = space.build(candidate)
        search.store(model, candidate)
        return search.judge.agreement(model)

    values = [search.ledger.take("check", c.slug, lambda c=c: judged(c)) for c in chosen]
    known.quality_check = check(known.quality, list(zip(chosen, values, strict=True)))
    timed = time_group(search, "check", f"{engine} times", chosen, engine)[1:]
    known.latency_check = errors(known.latency[engine], timed) | {"engine": engine}
    known.latency[engine].fit(known.latency[engine].timed + timed)
    for candidate in chosen:
        search.forget(candidate)


def refuse_what_nothing_meets(search: Search, known: Known) -> None:
    """Raise ConfigError, with the nearest candidate, where the cheapest of the space is above the budget."""
    limit = known.limit(search)
    if limit is None:
        return
    memory = search.options.memory_mb is not None
    unit, scale = ("MB", 1e6) if memory else ("ms", 1e3)
    cheapest = []
    for engine in known.engines:
        found = fronts(search.space, known.costs(search, engine), known.quality)
        cheapest += [(point.cost, engine, point.candidate) for some in found.values() for point in some[:1]]
    cost, engine, candidate = min(cheapest, key=lambda entry: entry[0])
    if cost > limit * (1.0 if memory else SLACK):
        where = "" if memory else f" in {engine} at {search.options.shape[0]}x{search.options.shape[1]}"
        raise ConfigError(
            f"tune: nothing meets {search.options.budget_words}: the nearest is {candidate.name} with about "
            f"{cost / scale:.3g} {unit}{where}"
        )


def table_bytes(search: Search) -> int:
    """Return the stored bytes of a token table beside one FFN."""
    config: Any = search.teacher.config
    width = int(getattr(config, "hidden_size", 0) or getattr(config, "dim", 0) or 0)
    return 4 * int(config.vocab_size) * width
