"""Which learning rate is tried next, and which is chosen.

Rates are tried in the order of their list. While the best of those tried is the smallest or the largest, the list goes
on beyond it, by the ratio of the last two, up to `extend` times. A rate whose run fails is worse than any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Trials = Mapping[float, float | None]
"""What each rate tried came to; None: its run failed."""


@dataclass(frozen=True)
class Choice:
    """What a search came to: the rate, and whether a better one may lie beyond those tried."""

    rate: float
    at_edge: bool


def next_rate(trials: Trials, rates: Sequence[float], extend: int, lower: bool) -> float | None:
    """Return the rate to try next; None: the search has ended.

    Args:
        trials: what was tried so far.
        rates: the list.
        extend: how often it may go on beyond its ends.
        lower: whether less is better.
    """
    for rate in rates:
        if rate not in trials:
            return rate
    if len(rates) < 2 or len(trials) - len(set(rates)) >= extend:
        return None
    return _beyond(trials, lower)


def choose(trials: Trials, lower: bool) -> Choice | None:
    """Return the best rate tried, of equals the smaller one; None: all failed."""
    best = _best(trials, lower)
    return None if best is None else Choice(best, len(trials) > 1 and _beyond(trials, lower) is not None)


def rounded(rate: float) -> float:
    """Return a rate with six digits, so that names of files and comparisons know it again."""
    return float(f"{rate:.6g}")


def _best(trials: Trials, lower: bool) -> float | None:
    known = {rate: value for rate, value in trials.items() if value is not None and math.isfinite(value)}
    sign = 1.0 if lower else -1.0
    return min(known, key=lambda rate: (sign * known[rate], rate), default=None)


def _beyond(trials: Trials, lower: bool) -> float | None:
    """Return the rate that follows the best one outwards, None where it lies between two others."""
    best, tried = _best(trials, lower), sorted(trials)
    if best is None or len(tried) < 2 or best not in (tried[0], tried[-1]):
        return None
    neighbour = tried[1] if best == tried[0] else tried[-2]
    return rounded(best * best / neighbour)
