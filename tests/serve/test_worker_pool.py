"""Workers that die, stand still or fail: every job is answered once, and no neighbour is taken along."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from nogemm.errors import NogemmError
from nogemm.serve.errors import ApiError
from nogemm.serve.kind import Kind
from nogemm.serve.metrics import Metrics
from nogemm.serve.options import ServeOptions
from nogemm.serve.pool import Pool
from nogemm.serve.waiting import Job

FAKE = [sys.executable, str(Path(__file__).with_name("fake_worker.py"))]


def run(work: Callable[[Pool], Awaitable[Any]], folder: str = "fine", **options: Any) -> Any:
    """Run something with a pool of fake workers."""

    async def main() -> Any:
        kind = Kind(task="embed", engine="torch", folder=folder, record={})
        pool = Pool(kind, ServeOptions(model="m", **options), Metrics())
        pool.command = FAKE
        await pool.start()
        try:
            return await work(pool)
        finally:
            await pool.stop()

    return asyncio.run(main())


def job(*ids: int) -> Job:
    return Job({"input_ids": list(ids)}, len(ids))


async def answers(pool: Pool, jobs: list[Job]) -> list[Any]:
    """Return a number for every job, or the code of its error."""
    pool.add(jobs)
    found = await asyncio.gather(*(one.future for one in jobs), return_exceptions=True)
    return [one.code if isinstance(one, ApiError) else one if isinstance(one, BaseException) else float(one[0])
            for one in found]  # fmt: skip


def test_every_text_has_its_own_answer() -> None:
    async def work(pool: Pool) -> None:
        jobs = [job(*range(i % 7 + 1), i) for i in range(300)]
        assert await answers(pool, jobs) == [float(sum(one.work["input_ids"])) for one in jobs]

    run(work, workers=2, batch_texts=16)


def test_a_text_that_kills_workers_takes_no_neighbour_along() -> None:
    async def work(pool: Pool) -> None:
        found = await answers(pool, [job(1), job(666), job(2), job(3, 4)])
        assert found == [1.0, "worker_died", 2.0, 7.0]
        assert pool.metrics.restarts._value.get() == 2
        assert await answers(pool, [job(5)]) == [5.0]

    run(work)


def test_a_worker_that_stands_still_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nogemm.serve.pool._GRACE", 0.1)

    async def work(pool: Pool) -> None:
        assert await answers(pool, [job(777)]) == ["worker_died"]
        assert await answers(pool, [job(2)]) == [2.0]

    run(work, request_seconds=1.0)


def test_failures_of_the_model_are_the_answer_of_their_text_alone() -> None:
    async def work(pool: Pool) -> None:
        assert await answers(pool, [job(888), job(2)]) == ["not_finite", 2.0]
        assert await answers(pool, [job(999)]) == ["model_failed"]
        assert await answers(pool, [job(3)]) == [3.0]
        assert pool.metrics.restarts._value.get() == 0

    run(work)


def test_a_queue_that_is_full_refuses_whole_requests() -> None:
    async def work(pool: Pool) -> None:
        with pytest.raises(ApiError, match="More than 3 texts") as refused:
            pool.add([job(i) for i in range(4)])
        assert (refused.value.status, refused.value.retry) == (503, True)
        assert len(pool.waiting) == 0
        assert await answers(pool, [job(i) for i in range(3)]) == [0.0, 1.0, 2.0]

    run(work, queue_texts=3)


def test_what_nobody_waits_for_is_not_computed() -> None:
    async def work(pool: Pool) -> None:
        jobs = [job(666) for _ in range(3)]
        pool.add(jobs)
        pool.drop(jobs)
        assert await answers(pool, [job(1)]) == [1.0]
        assert pool.metrics.restarts._value.get() == 0

    run(work)


def test_a_completion_that_has_begun_is_not_begun_again() -> None:
    async def work(pool: Pool) -> None:
        one = Job({"ids": [666]}, 1, streams=True)
        pool.add([one])
        assert one.pieces is not None
        pieces = [await one.pieces.get(), await one.pieces.get()]
        assert [piece.get("text") for piece in pieces] == ["a", None]
        assert isinstance(one.future.exception(), ApiError)
        while pool.metrics.restarts._value.get() < 1 or pool.ready < 1:
            await asyncio.sleep(0.01)

    run(work)


def test_a_model_that_cannot_be_loaded_is_an_error_of_the_start() -> None:
    async def never(pool: Pool) -> None:
        raise AssertionError

    with pytest.raises(NogemmError, match="the model is broken"):
        run(never, folder="broken", workers=2)


def test_jobs_that_are_left_at_the_end_get_an_error() -> None:
    async def work(pool: Pool) -> list[Job]:
        jobs = [job(777), job(1)]
        jobs[0].alone = True
        pool.add(jobs)
        while len(pool.waiting) == 2:
            await asyncio.sleep(0.01)
        return jobs

    async def main() -> list[Any]:
        pool = Pool(Kind(task="embed", engine="torch", folder="", record={}), ServeOptions(model="m"), Metrics())
        pool.command = FAKE
        await pool.start()
        jobs = await work(pool)
        (worker,) = pool.workers.values()
        worker.process.kill()
        for task in pool._tasks:
            task.cancel()
        await pool.stop()
        return [one.future.exception() for one in jobs]

    assert [getattr(error, "code", None) for error in asyncio.run(main())] == ["stopping", "stopping"]
