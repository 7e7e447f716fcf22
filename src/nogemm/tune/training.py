"""Short distillations of the few, then full ones of the winner and its rivals.

A short run tells candidates apart; what a full one will bring is guessed from how losses fall with tokens. Budgets are
tokens, planned once from the speed that was measured, so that a resumed search trains exactly as one that nobody
stopped. Reading order: `short_runs`, `full_runs`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nogemm.errors import NotFiniteError
from nogemm.models.depth import spread_numbers
from nogemm.train.distil import distil
from nogemm.train.errors import DivergedError
from nogemm.train.options import DistilOptions
from nogemm.tune.offers import DENSE
from nogemm.tune.search import Costs, shortlist
from nogemm.tune.space import Candidate, candidate_of
from nogemm.tune.stages import SLACK, Known
from nogemm.tune.state import Search

FALL = 0.25  # a loss falls with tokens to the power of minus this, until two runs of one candidate say otherwise
KEPT = 3  # of those that go on, one in so many
GROWTH = 3  # tokens of a round, as a multiple of the round before
AGAIN = 3  # candidates that the learnt model adds
SHORT, FULL = 0.35, 0.75  # of the time that is left: for short runs, then for full ones
LEAST, MOST = 4_096, 20_000_000  # tokens
_GUESSED_SPEED = 0.25  # of the dense model's tokens a second, before a run was seen
LR_EXACT, LR_FITTED = 2e-4, 5e-4  # of FFNs' matrices where there is no first stage: they start from trained ones


@dataclass(frozen=True)
class Run:
    """A candidate that was distilled."""

    candidate: Candidate
    tokens: int
    agreement: float
    seconds: float


def distilled(search: Search, stage: str, candidate: Candidate, tokens: int) -> Run:
    """Distil a candidate on so many tokens and keep its model, or return what an earlier session did.

    Raises:
        NotFiniteError: a loss or gradient was not finite.
    """

    def work() -> dict[str, Any]:
        search.note(f"distilling {candidate.name} on {tokens:,} tokens")
        model = search.space.build(candidate)
        folder = search.folder / "runs" / f"{candidate.slug}-{tokens}"
        try:
            report = distil(
                model,
                search.teacher,
                search.texts.train,
                tokenizer=search.space.tokenizer,
                validation=search.texts.validation,
                output_dir=folder,
                resume=True,
                options=options_for(search, candidate, tokens),
            )
        except DivergedError as error:
            return {"failed": str(error)}
        search.store(model, candidate, tokens)
        shutil.rmtree(folder, ignore_errors=True)
        return {"agreement": report.agreement, "tokens": report.tokens, "seconds": report.seconds}

    found = search.ledger.take(stage, _key(candidate, tokens), work)
    if "failed" in found:
        raise NotFiniteError(found["failed"])
    return Run(candidate, tokens, found["agreement"], found["seconds"])


def options_for(search: Search, candidate: Candidate, tokens: int) -> DistilOptions:
    """Return how a candidate is distilled."""
    space = search.space
    reads = any(config.reads_ids for config in space.configs(candidate).values())
    trees = any("tree" in config.kind for config in space.configs(candidate).values())
    chosen: dict[str, Any] = {"tokens": tokens, "seed": search.options.seed, "checkpoint_seconds": 60.0}
    if reads or trees:
        chosen["optimizer"] = "lazy-adam"
    if len(candidate.kept) < space.depth:
        chosen["hidden_map"] = tuple(i + 1 for i in candidate.kept)
        chosen["lr_other"] = LR_EXACT if set(candidate.ffns) == {DENSE} else LR_FITTED
    return DistilOptions(**chosen | dict(search.options.distil))


def short_runs(search: Search, known: Known) -> list[Run]:
    """Distil a shortlist for a short time, learn from it, and go on with the best of them.

    Returns:
        the longest run of each candidate.
    """
    first = _shortlisted(search, known, search.options.shortlist, ())
    if not first:
        note_once(search, "No candidate is expected to be cheaper than the dense model: none was distilled.")
        return []
    tokens = search.ledger.take("short", "plan", lambda: _plan_short(search, len(first) + AGAIN))["tokens"]
    runs = _in_time(search, first, tokens)
    if not runs:
        return []
    known.quality.learn([(run.candidate, 1 - run.agreement) for run in runs])
    second = _remembered(search, "second", lambda: _second(search, known, runs))
    runs += _in_time(search, second, tokens, runs)
    best = _remembered(
        search, "best", lambda: [r.candidate for r in ranked(search, known, runs)[: math.ceil(len(runs) / KEPT)]]
    )
    longer = _in_time(search, best, GROWTH * tokens, runs) if len(best) < len(runs) else []
    return longer + [run for run in runs if run.candidate not in {one.candidate for one in longer}]


def _in_time(search: Search, some: Sequence[Candidate], tokens: int, before: Sequence[Run] = ()) -> list[Run]:
    """Distil candidates one after the other, the first always where nothing was before, as long as there is time."""
    runs: list[Run] = []
    for candidate in some:
        last = (runs or list(before))[-1:]
        if last and not _known(search, "short", candidate, tokens):
            seconds = last[0].seconds * tokens / last[0].tokens
            if search.ledger.left() < 2 * seconds:
                note_once(search, "Time ran out among the short runs: fewer candidates were distilled than planned.")
                break
        try:
            runs.append(distilled(search, "short", candidate, tokens))
        except NotFiniteError as error:
            note_once(search, f"{candidate.name} was given up: {error}.")
    return runs


def _remembered(
    search: Search, key: str, choose: Callable[[], list[Candidate]], stage: str = "short"
) -> list[Candidate]:
    """Make a choice that depends on the time left once, so that a resumed search makes no other."""
    found = search.ledger.take(stage, key, lambda: [candidate.to_dict() for candidate in choose()])
    return [candidate_of(entry) for entry in found]


def _known(search: Search, stage: str, candidate: Candidate, tokens: int) -> bool:
    return _key(candidate, tokens) in search.ledger.stage(stage)


def _key(candidate: Candidate, tokens: int) -> str:
    return f"{candidate.slug} {tokens}"


def note_once(search: Search, said: str) -> None:
    """Add a note, unless it is there."""
    if said not in search.notes:
        search.notes.append(said)


def _plan_short(search: Search, count: int) -> dict[str, Any]:
    if search.options.short_tokens is not None:
        return {"tokens": search.options.short_tokens}
    speed = _GUESSED_SPEED * tokens_per_second(search)
    share = SHORT * max(search.ledger.left(), 1.0)
    # A round of all, then a third of them with three times the tokens: twice the first round.
    return {"tokens": int(min(MOST, max(LEAST, share * speed / (2 * count)))), "speed": speed}


def tokens_per_second(search: Search) -> float:
    """Return how many tokens the dense model embeds in a second, from its time per call."""
    batch, length = search.options.shape
    row = search.first_rows()
    us = [row[name]["us_median"] for name in row if row[name].get("us_median") is not None and "torch-fp32" in name]
    us = us or [2 * row[name]["us_median"] for name in row if row[name].get("us_median") is not None]
    return 1e6 * batch * length / min(us)


def _second(search: Search, known: Known, runs: Sequence[Run]) -> list[Candidate]:
    """Return a few more that the learnt model prefers to those that were tried."""
    tried = [run.candidate for run in runs]
    found = _shortlisted(search, known, 4 * AGAIN, tried)
    factor = (full_tokens_guess(search, runs) / runs[0].tokens) ** -FALL
    return sorted(found, key=lambda c: _rank(search, known, c, 1 - factor * known.quality.loss(c)))[:AGAIN]


def _shortlisted(search: Search, known: Known, count: int, tried: Sequence[Candidate]) -> list[Candidate]:
    """Choose whom to distil: those that should meet the budget first, as time may run out behind any of them."""
    found: list[Candidate] = []
    above: set[Candidate] = set()  # a guess that may turn out below
    limit = known.limit(search)
    for engine in known.engines:
        costs: Costs = known.costs(search, engine)
        each = math.ceil(count / len(known.engines))
        most = None if limit is None else min(limit * SLACK, 0.97 * costs.of(search.space.whole))
        some = shortlist(search.space, costs, known.quality, each, most=most, known=[*tried, *found])
        found += [c for c in some if known.engine_for(search, c) is not None]
        above |= {c for c in some if limit is not None and costs.of(c) > limit}
    return sorted(found[:count], key=lambda c: c in above)


def ranked(search: Search, known: Known, runs: Sequence[Run], full: int | None = None) -> list[Run]:
    """Sort runs by how well they meet the budget, the best first, each as if it had `full` tokens."""
    full = full or full_tokens_guess(search, runs)
    exponent = measured_fall(runs)

    def expected(run: Run) -> float:
        return 1 - (1 - run.agreement) * (max(full, run.tokens) / run.tokens) ** -exponent

    return sorted(runs, key=lambda run: _rank(search, known, run.candidate, expected(run)))


def measured_fall(runs: Sequence[Run]) -> float:
    """Return the power by which losses fell between two runs of one candidate; a usual one where there are none."""
    found = []
    for one in runs:
        for other in runs:
            if one.candidate == other.candidate and one.tokens < other.tokens and 0 < one.agreement < 1:
                ratio = max(1 - other.agreement, 1e-9) / (1 - one.agreement)
                found.append(-math.log(ratio) / math.log(other.tokens / one.tokens))
    return min(1.0, max(0.05, float(np.median(found)))) if found else FALL


def _rank(search: Search, known: Known, candidate: Candidate, agreement: float) -> tuple[float, ...]:
    """Return a key that sorts the best first: those that should meet the budget, then the nearest to it."""
    options = search.options
    engine, us = known.engine_for(search, candidate) or ("", math.inf)
    if options.quality is not None:
        met = agreement >= options.quality
        return (0.0, us) if met else (1.0, options.quality - agreement)
    cost = known.costs(search, engine).of(candidate) if engine else math.inf
    limit = known.limit(search) or math.inf
    over = max(0.0, cost / limit - 1)
    slack = 0.0 if options.memory_mb is not None else SLACK - 1
    return (0.0, -agreement) if over <= slack else (1.0, over)


def full_tokens_guess(search: Search, runs: Sequence[Run]) -> int:
    """Return about how many tokens a full run will have."""
    if search.options.tokens is not None:
        return search.options.tokens
    speed = sum(run.tokens for run in runs) / max(1e-9, sum(run.seconds for run in runs))
    return int(min(MOST, max(LEAST, FULL * max(search.ledger.left(), 1.0) * speed / 3)))


def full_runs(search: Search, known: Known, runs: Sequence[Run]) -> tuple[Run | None, dict[str, Run]]:
    """Distil the winner in full, and its rivals alike; return the winner and {name of the rival: its run}.

    Where the best candidate's loss is not finite, the next best takes its place; None: none could be trained.
    """
    order = _remembered(search, "order", lambda: [run.candidate for run in ranked(search, known, runs)], stage="full")
    most = max(run.tokens for run in runs)
    plan = search.ledger.take(
        "full", "plan", lambda: {"tokens": search.options.tokens or max(most, full_tokens_guess(search, runs))}
    )
    first = _first_finite(search, order, plan["tokens"])
    found: dict[str, Run] = {}
    if first is None:
        return None, found
    for name, candidate in rivals(search, known, first.candidate).items():
        if candidate == first.candidate:
            continue
        if search.ledger.left() < first.seconds and not _known(search, "full", candidate, plan["tokens"]):
            note_once(search, f"Time ran out before {name} were distilled as long as the winner.")
            continue
        try:
            found[name] = distilled(search, "full", candidate, plan["tokens"])
        except NotFiniteError as error:
            note_once(search, f"{name}, {candidate.name}, were given up: {error}.")
    return first, found


def _first_finite(search: Search, order: Sequence[Candidate], tokens: int) -> Run | None:
    """Distil the first candidate in full whose loss stays finite."""
    for candidate in order:
        try:
            return distilled(search, "full", candidate, tokens)
        except NotFiniteError as error:
            note_once(search, f"{candidate.name} was given up: {error}.")
    return None


def rivals(search: Search, known: Known, winner: Candidate) -> dict[str, Candidate]:
    """Return fewer layers and narrow FFNs alone, each as good as fits into the winner's guessed time."""
    space = search.space
    entry = known.engine_for(search, winner)
    us = math.inf if entry is None else entry[1]

    def time_of(candidate: Candidate) -> float:
        found = known.engine_for(search, candidate)
        return math.inf if found is None else found[1]

    found: dict[str, Candidate] = {}
    if space.droppable:
        shallow = [space.uniform(DENSE, spread_numbers(space.depth, count)) for count in range(1, space.depth)]
        fitting = [c for c in shallow if time_of(c) <= us]
        if shallow:
            best = max(fitting, key=lambda c: len(c.kept)) if fitting else shallow[0]
            found["fewer layers"] = best
    narrow = [space.uniform(name) for name in space.offers if name.startswith("narrow") and "+" not in name]
    narrow = [c for c in narrow if time_of(c) < math.inf]
    if narrow:
        fitting = [c for c in narrow if time_of(c) <= us]
        found["narrow FFNs"] = max(fitting, key=time_of) if fitting else min(narrow, key=time_of)
    return found


def as_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return runs as JSON values."""
    return [
        {"name": run.candidate.name, "tokens": run.tokens, "agreement": run.agreement, "seconds": run.seconds}
        for run in runs
    ]
