"""Which waiting texts go together."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

from nogemm.serve.waiting import Job, Waiting


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(work())  # type: ignore[arg-type]


def test_a_batch_is_the_oldest_text_and_its_neighbours_in_length() -> None:
    async def work() -> None:
        waiting = Waiting(texts=3, tokens=1000)
        jobs = [Job({}, length) for length in (10, 50, 11, 90, 9)]
        for job in jobs:
            waiting.add(job)
        assert {job.tokens for job in await waiting.take()} == {9, 10, 11}
        assert {job.tokens for job in await waiting.take()} == {50, 90}

    run(work)


def test_padding_counts() -> None:
    async def work() -> None:
        waiting = Waiting(texts=64, tokens=40)
        for length in (10, 10, 30, 5, 5, 100):
            waiting.add(Job({}, length))
        assert sorted(job.tokens for job in await waiting.take()) == [5, 5, 10, 10]
        assert [job.tokens for job in await waiting.take()] == [30]
        assert [job.tokens for job in await waiting.take()] == [100]  # one text always fits

    run(work)


def test_all_are_taken_once_within_the_limits_and_the_oldest_is_always_among_them() -> None:
    async def work() -> None:
        chance = random.Random(0)
        for _ in range(50):
            waiting = Waiting(texts=chance.randint(1, 9), tokens=chance.randint(1, 300))
            left = [Job({}, chance.randint(0, 60)) for _ in range(chance.randint(1, 60))]
            for job in left:
                waiting.add(job)
            while left:
                batch = await waiting.take()
                assert left[0] in batch
                assert len(batch) <= waiting.texts
                assert len(batch) == 1 or len(batch) * max(job.tokens for job in batch) <= waiting.tokens
                for job in batch:
                    left.remove(job)
            assert len(waiting) == 0

    run(work)


def test_alone_first_and_removed() -> None:
    async def work() -> None:
        waiting = Waiting(texts=8, tokens=1000)
        one, two, three = (Job({}, 5) for _ in range(3))
        waiting.add(one)
        waiting.add(two)
        three.alone = True
        waiting.add(three, first=True)
        assert await waiting.take() == [three]
        waiting.remove(one)
        waiting.remove(one)
        assert await waiting.take() == [two]
        taking = asyncio.ensure_future(waiting.take())
        await asyncio.sleep(0)
        assert not taking.done()
        waiting.add(one)
        assert await taking == [one]

    run(work)
