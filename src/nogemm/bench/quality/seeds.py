"""Means over seeds with Student's interval, differences paired by seed, and the front of what nothing beats.

Legend: n runs, s their standard deviation.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from nogemm.errors import ConfigError

LEVEL = 0.95


def seed_mean(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean of runs that differ in their seed, with the 95 % interval of Student's t.

        mean +- t(0.975, n - 1) s / sqrt(n)

    Returns:
        {"value", "low", "high", "samples"}; low and high are None of a single run, which says nothing about others.
    Raises:
        ValueError: no value, or one that is not finite. ConfigError: SciPy is not installed.
    Example:
        >>> found = seed_mean([1.0, 2.0, 3.0])
        >>> found["value"], round(found["high"], 3)
        (2.0, 4.484)
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"a mean over seeds needs finite values, got {list(values)}")
    mean, count = fmean(values), len(values)
    if count == 1:
        return {"value": mean, "low": None, "high": None, "samples": 1}
    half = student_quantile(count - 1) * stdev(values) / math.sqrt(count)
    return {"value": mean, "low": mean - half, "high": mean + half, "samples": count}


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """Return the mean of ours - theirs over the seeds that both have, with its interval; None: they share none.

    Runs of a seed read the same data in the same order, so the difference varies less than either.
    """
    shared = [seed for seed in ours if seed in theirs]
    return seed_mean([ours[seed] - theirs[seed] for seed in shared]) if shared else None


def student_quantile(freedom: int) -> float:
    """Return the t that Student's distribution exceeds with a probability of 2.5 %."""
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError("intervals over seeds need SciPy: pip install 'nogemm[study]'")
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.5 + LEVEL / 2))


def front(points: Sequence[tuple[float, float]], lower: bool) -> list[int]:
    """Return which points (cost, value) no other beats in one without losing in the other, by rising cost.

    Args:
        lower: whether a smaller value is better.
    """
    sign = 1.0 if lower else -1.0
    best, found = math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], sign * points[i][1])):
        if sign * points[index][1] < best:
            best = sign * points[index][1]
            found.append(index)
    return found
