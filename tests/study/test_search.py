"""The search for a rate: the list first, then beyond its ends, failed rates last."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nogemm.study.search import Choice, choose, next_rate


def searched(
    value: Callable[[float], float | None], rates: tuple[float, ...], extend: int = 3, lower: bool = True
) -> tuple[list[float], Choice | None]:
    trials: dict[float, float | None] = {}
    while (rate := next_rate(trials, rates, extend, lower)) is not None:
        trials[rate] = value(rate)
    return list(trials), choose(trials, lower)


def test_an_inner_best_ends_the_search() -> None:
    tried, choice = searched(lambda rate: abs(rate - 2.0), (1.0, 2.0, 4.0))
    assert tried == [1.0, 2.0, 4.0]
    assert choice == Choice(2.0, False)


@pytest.mark.parametrize(("best", "tried"), [(8.0, [1.0, 2.0, 4.0, 8.0, 16.0]), (0.5, [1.0, 2.0, 4.0, 0.5, 0.25])])
def test_an_end_is_extended_until_it_is_none(best: float, tried: list[float]) -> None:
    found, choice = searched(lambda rate: abs(rate - best), (1.0, 2.0, 4.0))
    assert found == tried
    assert choice == Choice(best, False)


def test_extending_ends_and_is_told() -> None:
    tried, choice = searched(lambda rate: -rate, (1.0, 2.0), extend=2)
    assert tried == [1.0, 2.0, 4.0, 8.0]
    assert choice == Choice(8.0, True)


def test_a_failed_rate_is_worse_than_any() -> None:
    tried, choice = searched(lambda rate: None if rate > 2 else -rate, (1.0, 2.0, 4.0))
    assert tried == [1.0, 2.0, 4.0]
    assert choice == Choice(2.0, False)
    assert searched(lambda rate: None, (1.0, 2.0)) == ([1.0, 2.0], None)
    assert searched(lambda rate: float("nan"), (1.0, 2.0))[1] is None


def test_more_may_be_better_and_ties_go_to_the_smaller() -> None:
    assert searched(lambda rate: -abs(rate - 2.0), (1.0, 2.0, 4.0), lower=False)[1] == Choice(2.0, False)
    assert searched(lambda rate: 1.0, (2.0, 1.0, 4.0), extend=0)[1] == Choice(1.0, True)


def test_one_rate_is_taken_as_it_is() -> None:
    assert searched(lambda rate: 1.0, (3.0,)) == ([3.0], Choice(3.0, False))
