"""How much of the true top k a two-stage selection finds, before it is run.

Two-stage: a row of n numbers is cut into buckets, each bucket keeps its largest `kept`, and the k largest of what is
kept are the answer. A winner is lost only where more than `kept` of the k winners fall into one bucket.

Legend: n numbers a row, k winners, s numbers a bucket, r winners that fall into a bucket.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from nogemm.errors import ConfigError
from nogemm.ops._arguments import real, whole

_NEGLIGIBLE = 1e-18  # of the largest probability: what follows adds nothing to a sum in float64


def expected_recall(n: int, k: int, buckets: int | Sequence[int], kept: int) -> float:
    """Compute which share of the k winners is found when each bucket keeps its `kept` largest.

        E[recall] = 1 - (1 / k) sum_b sum_{r > kept} (r - kept) C(k, r) C(n - k, s_b - r) / C(n, s_b)

    It holds when the k winners are at random places of the row. Winners that stand together in a row whose buckets
    are contiguous fill one bucket, and recall is lower.

    Args:
        n: numbers a row.
        k: winners looked for; 0 gives recall 1.
        buckets: how many, of sizes that differ by at most 1; or the size of each, with sum n.
        kept: how many each bucket keeps.
    Returns:
        From 0 to 1. Up to n of a million, 1 minus it is good to 9 digits, or to what float64 holds next to 1.
    Raises:
        ConfigError: k is not from 0 to n, no bucket, sizes that do not add up to n, a negative `kept`.
    Cost: O(k) for each of the distinct sizes, of which there are at most two when `buckets` is a number.
    Source: "A Faster Generalized Two-Stage Approximate Top-K" (2025, arXiv 2506.04165), expected recall,
    extended to buckets of unequal sizes.
    Example:
        >>> expected_recall(4, 2, 2, 1)  # both share a bucket for 1 of 3 places, and one is lost
        0.8333333333333333
    """
    sizes = _sizes(n, k, buckets, "expected_recall")
    if whole(kept, "kept", "expected_recall") < 0:
        raise ConfigError(f"expected_recall: kept must be at least 0, got kept={kept}")
    if k == 0:
        return 1.0
    lost = math.fsum(count * _excess(n, k, size, kept) for size, count in sizes.items())
    return min(1.0, max(0.0, 1.0 - lost / k))


def kept_for_recall(n: int, k: int, buckets: int | Sequence[int], recall: float) -> int:
    """Find the least `kept` whose `expected_recall` is at least `recall`.

    Args:
        n, k, buckets: as in `expected_recall`.
        recall: from 0 to 1. 1 gives min(k, largest bucket), which loses nothing wherever the winners stand.
    Raises:
        ConfigError: as `expected_recall`, or a recall that is not from 0 to 1.
    Cost: log2(k) times `expected_recall`.
    Example:
        >>> kept_for_recall(50_000, 50, 128, 0.99)
        3
    """
    sizes = _sizes(n, k, buckets, "kept_for_recall")
    if not 0 <= real(recall, "recall", "kept_for_recall") <= 1:
        raise ConfigError(f"kept_for_recall: recall must be from 0 to 1, got recall={recall}")
    low, high = 0, min(k, max(sizes))
    if recall == 1:
        return high
    while low < high:
        middle = (low + high) // 2
        if expected_recall(n, k, buckets, middle) >= recall:
            high = middle
        else:
            low = middle + 1
    return low


def bucket_sizes(n: int, buckets: int) -> list[int]:
    """Cut n numbers into `buckets` sizes that differ by at most 1, the larger ones first."""
    size, longer = divmod(n, buckets)
    return [size + 1] * longer + [size] * (buckets - longer)


def _sizes(n: int, k: int, buckets: int | Sequence[int], caller: str) -> Counter[int]:
    """Count the buckets of each size."""
    n, k = whole(n, "n", caller), whole(k, "k", caller)
    if not 0 <= k <= n:
        raise ConfigError(f"{caller}: k must be from 0 to n, got k={k} and n={n}")
    if not isinstance(buckets, Sequence) or isinstance(buckets, str):
        buckets = whole(buckets, "buckets", caller)
        if buckets < 1:
            raise ConfigError(f"{caller}: at least one bucket is needed, got buckets={buckets}")
        size, longer = divmod(n, buckets)
        return +Counter({size + 1: longer, size: buckets - longer})
    buckets = [whole(size, "buckets", caller) for size in buckets]
    if not buckets or min(buckets) < 0 or sum(buckets) != n:
        raise ConfigError(f"{caller}: sizes of buckets must be at least 0 and add up to n={n}, got {list(buckets)}")
    return Counter(buckets)


def _excess(n: int, k: int, size: int, kept: int) -> float:
    """Compute E[max(r - kept, 0)] of r winners among the `size` numbers of one bucket: r is hypergeometric.

    The logarithm of one probability comes from the gamma function, that of the most likely r above `kept`; its
    neighbours follow by their ratios, which lose no digits.
    """
    least, most = max(0, size - (n - k)), min(k, size)
    if kept >= most:
        return 0.0
    start = max(kept + 1, least, min(most, (size + 1) * (k + 1) // (n + 2)))

    def ratio(r: int) -> float:  # P(r + 1) / P(r)
        return (k - r) * (size - r) / ((r + 1) * (n - k - size + r + 1))

    terms = [float(start - kept)]
    share = 1.0
    for r in range(start, most):
        share *= ratio(r)
        terms.append((r + 1 - kept) * share)
        if share < _NEGLIGIBLE:
            break
    share = 1.0
    for r in range(start - 1, max(kept + 1, least) - 1, -1):
        share /= ratio(r)
        terms.append((r - kept) * share)
        if share < _NEGLIGIBLE:
            break
    log_start = _log_choose(k, start) + _log_choose(n - k, size - start) - _log_choose(n, size)
    return math.exp(log_start) * math.fsum(terms)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
