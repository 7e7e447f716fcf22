"""expected_recall: against exact fractions, against simulation, at the ends; kept_for_recall is its inverse."""

import random
from fractions import Fraction
from math import comb

import pytest

from nogemm.errors import ConfigError
from nogemm.ops.topk_recall import bucket_sizes, expected_recall, kept_for_recall


def exact(n: int, k: int, sizes: list[int], kept: int) -> Fraction:
    """Sum the formula in rational numbers."""
    lost = Fraction(0)
    for size in sizes:
        for r in range(kept + 1, min(k, size) + 1):
            lost += Fraction((r - kept) * comb(k, r) * comb(n - k, size - r), comb(n, size))
    return 1 - lost / k


@pytest.mark.parametrize(
    ("n", "k", "buckets", "kept"),
    [(4, 2, 2, 1), (12, 12, 4, 2), (37, 9, 5, 3), (64, 1, 8, 1), (500, 40, 7, 8), (300, 290, 11, 20), (90, 30, 1, 4)],
)
def test_equals_the_exact_fractions(n: int, k: int, buckets: int, kept: int) -> None:
    expected = exact(n, k, bucket_sizes(n, buckets), kept)
    assert expected_recall(n, k, buckets, kept) == pytest.approx(float(expected), rel=1e-12)
    # Negative control: one more or one fewer kept is another number.
    assert expected_recall(n, k, buckets, kept - 1) < float(expected) - 1e-6


def test_small_losses_keep_their_digits() -> None:
    expected = exact(2000, 20, bucket_sizes(2000, 50), 5)
    loss = 1 - expected_recall(2000, 20, 50, 5)
    assert float(1 - expected) < 1e-5
    assert loss == pytest.approx(float(1 - expected), rel=1e-9)


@pytest.mark.parametrize(("n", "k", "sizes", "kept"), [(600, 60, [150] * 4, 16), (603, 40, [300, 200, 103], 15)])
def test_simulation_agrees(n: int, k: int, sizes: list[int], kept: int) -> None:
    draw = random.Random(3)
    owner = [b for b, size in enumerate(sizes) for _ in range(size)]
    runs, total, squares = 3000, 0.0, 0.0
    for _ in range(runs):
        found = [0] * len(sizes)
        for place in draw.sample(range(n), k):
            found[owner[place]] += 1
        recall = sum(min(kept, r) for r in found) / k
        total, squares = total + recall, squares + recall * recall
    mean = total / runs
    error = ((squares / runs - mean * mean) / runs) ** 0.5
    assert abs(mean - expected_recall(n, k, sizes, kept)) < 4 * error
    assert abs(mean - expected_recall(n, k, sizes, kept + 1)) > 4 * error


def test_the_ends() -> None:
    assert expected_recall(100, 0, 4, 0) == 1
    assert expected_recall(100, 10, 4, 0) == pytest.approx(0, abs=1e-12)
    assert expected_recall(100, 10, 4, 10) == 1
    assert expected_recall(100, 100, 4, 25) == 1
    assert expected_recall(3, 2, 10, 1) == 1  # more buckets than numbers
    assert expected_recall(0, 0, 3, 1) == 1
    # A million numbers: no overflow, and between its neighbours.
    assert 0.9 < expected_recall(1_000_000, 50_000, 1024, 52) < expected_recall(1_000_000, 50_000, 1024, 60) < 1
    assert expected_recall(1_000_000, 500_000, 2, 250_000) == pytest.approx(1 - 0.3989 * 500 / 2 / 250_000, abs=5e-7)


@pytest.mark.parametrize("recall", [0.0, 0.5, 0.9, 0.99, 0.999999, 1.0])
@pytest.mark.parametrize(("n", "k", "buckets"), [(262_144, 256, 64), (16_384, 819, 128), (1000, 5, 3), (50, 0, 4)])
def test_kept_is_the_least_that_reaches_the_recall(n: int, k: int, buckets: int, recall: float) -> None:
    kept = kept_for_recall(n, k, buckets, recall)
    assert expected_recall(n, k, buckets, kept) >= recall
    if kept and recall < 1:
        assert expected_recall(n, k, buckets, kept - 1) < recall


def test_unequal_shards() -> None:
    assert kept_for_recall(100, 10, [90, 10], 1.0) == 10
    assert expected_recall(100, 10, [100, 0], 4) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((10, 11, 2, 1), "k=11 and n=10"),
        ((10, -1, 2, 1), "k=-1"),
        ((10, 2, 0, 1), "buckets=0"),
        ((10, 2, [3, 3], 1), r"add up to n=10, got \[3, 3\]"),
        ((10, 2, [], 1), "add up"),
        ((10, 2, [12, -2], 1), "at least 0"),
        ((10, 2, 2, -1), "kept=-1"),
        ((10.5, 2, 2, 1), r"n must be a whole number, got n=10\.5"),
        ((10, "2", 2, 1), "k must be a whole number, got k='2'"),
        ((10, 2, 2.5, 1), r"buckets must be a whole number, got buckets=2\.5"),
        ((10, 2, [5, 5.0], 1), r"buckets must be a whole number, got buckets=5\.0"),
        ((10, 2, 2, None), "kept must be a whole number, got kept=None"),
    ],
)
def test_errors_speak(args: tuple, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        expected_recall(*args)


def test_a_recall_above_one_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"recall=1\.5"):
        kept_for_recall(10, 2, 2, 1.5)
    with pytest.raises(ConfigError, match="recall must be a number, got recall='all'"):
        kept_for_recall(10, 2, 2, "all")  # type: ignore[arg-type]
