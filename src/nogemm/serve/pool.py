"""The workers: started, fed with batches, started anew when they die.

A job is answered once. When a worker dies, the jobs of its batch go to another one, each alone, so that a text that
kills workers takes no neighbour along; the second death is its answer. A completion that has begun to stream is not
begun again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from dataclasses import asdict
from typing import Any

import numpy as np

from nogemm.errors import NogemmError
from nogemm.hardware.cpu import usable_cores
from nogemm.hardware.waiting import VARIABLES
from nogemm.serve import frames
from nogemm.serve.errors import ApiError
from nogemm.serve.kind import Kind
from nogemm.serve.metrics import Metrics
from nogemm.serve.options import ServeOptions
from nogemm.serve.waiting import Job, Waiting

_log = logging.getLogger("nogemm.serve")
TRIES = 2
_GRACE, _LONGEST_PAUSE = 10.0, 30.0


class WorkerDied(Exception):
    """A worker's output ended, or it stood still."""


class _Worker:
    """One process, and what it is told and says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self.given, self.said = process.stdin, process.stdout

    async def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(ConnectionError):  # it has died; the read that follows says so
            self.given.write(frames.pack_frame(message))
            await self.given.drain()

    async def read(self) -> tuple[dict[str, Any], Any]:
        try:
            words, data = frames.lengths(await self.said.readexactly(frames.HEAD.size))
            return frames.unpack_frame(await self.said.readexactly(words), await self.said.readexactly(data))
        except (EOFError, ConnectionError, ValueError) as error:
            raise WorkerDied from error

    async def end(self, grace: float = 0.0) -> None:
        """Close its input, and after `grace` seconds kill it."""
        self.given.close()
        try:
            async with asyncio.timeout(grace):
                await self.process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()


class Pool:
    """Workers of one model.

    Args:
        kind: what they load.
        options: of the server.
        metrics: are counted here.
    Attributes:
        command: what a worker is started by.
        waiting: jobs that no worker has taken yet.
        facts: what the first worker says of its model.
        ready: workers that have a model.
    """

    def __init__(self, kind: Kind, options: ServeOptions, metrics: Metrics) -> None:
        self.kind, self.options, self.metrics = kind, options, metrics
        self.waiting = Waiting(options.batch_texts, options.batch_tokens)
        self.command = [sys.executable, "-m", "nogemm.serve.worker"]
        self.facts: dict[str, Any] = {}
        self.threads = options.threads or max(1, usable_cores() // options.workers)
        self.workers: dict[int, _Worker] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._numbers = 0

    @property
    def ready(self) -> int:
        return len(self.workers)

    async def start(self) -> None:
        """Start all workers and wait until they have loaded.

        Raises:
            NogemmError: one cannot load the model; none is left.
        """
        loading = [asyncio.create_task(self._begin()) for _ in range(self.options.workers)]
        done = await asyncio.gather(*loading, return_exceptions=True)
        started = [worker for worker in done if isinstance(worker, _Worker)]
        failures = [error for error in done if isinstance(error, BaseException)]
        if failures:
            await asyncio.gather(*(worker.end() for worker in started))
            raise failures[0]
        self._tasks = [asyncio.create_task(self._keep(slot, worker)) for slot, worker in enumerate(started)]

    async def stop(self) -> None:
        """End all workers; jobs that are left get an error."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while len(self.waiting):
            for job in await self.waiting.take():
                fail(job, ApiError(503, "The server has stopped.", "stopping", retry=True))
        self._count()

    def add(self, jobs: list[Job]) -> None:
        """Let jobs wait for a worker.

        Raises:
            ApiError: too many are waiting; none was added.
        """
        most = self.options.queue_texts
        if len(self.waiting) + len(jobs) > most:
            raise ApiError(
                503,
                f"More than {most} texts are waiting for this server; try again in a moment.",
                "queue_full",
                retry=True,
            )
        for job in jobs:
            self.waiting.add(job)
        self._count()

    def drop(self, jobs: list[Job]) -> None:
        """Forget jobs that nobody waits for."""
        for job in jobs:
            self.waiting.remove(job)
            job.future.cancel()
        self._count()

    async def _begin(self) -> _Worker:
        """Start one process and load the model in it."""
        process = await asyncio.create_subprocess_exec(
            *self.command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=_environment(self.threads),
            start_new_session=True,  # Ctrl-C is the server's to hear
        )
        worker = _Worker(process)
        try:
            async with asyncio.timeout(self.options.start_seconds):
                options = self.options
                first = {"dtype": options.dtype, "body": options.body, "max_length": options.max_length}
                first |= {"kind": asdict(self.kind), "threads": self.threads, "share": options.workers > 1}
                await worker.send(first)
                message, _ = await worker.read()
            if "failed" in message:
                raise NogemmError(message["failed"])
        except TimeoutError:
            await worker.end()
            seconds = self.options.start_seconds
            raise NogemmError(f"serve: a worker had not loaded the model after {seconds:g} s") from None
        except WorkerDied:
            code = await process.wait()
            raise NogemmError(f"serve: a worker ended while it loaded the model (code {code})") from None
        except BaseException:
            await worker.end()
            raise
        self.facts = self.facts or message["ready"]
        return worker

    async def _keep(self, slot: int, worker: _Worker) -> None:
        """Feed the worker of one place, and start another where it has died."""
        pause = 0.0
        while True:
            self.workers[slot] = worker
            self._count()
            try:
                while True:
                    await self._one(worker)
                    pause = 0.0
            except WorkerDied:
                del self.workers[slot]
                self.metrics.restarts.inc()
                self._count()
                await worker.end()
            except asyncio.CancelledError:
                self.workers.pop(slot, None)
                await worker.end(_GRACE)
                raise
            while True:
                await asyncio.sleep(pause)
                pause = min(_LONGEST_PAUSE, 2 * pause or 0.5)
                try:
                    worker = await self._begin()
                    break
                except (NogemmError, OSError) as error:
                    _log.error("a worker did not start again: %s", error)

    async def _one(self, worker: _Worker) -> None:
        """Let a worker compute the next batch."""
        dying = asyncio.ensure_future(worker.process.wait())
        taking = asyncio.ensure_future(self.waiting.take())
        try:
            await asyncio.wait({dying, taking}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            dying.cancel()
            taking.cancel()
        batch = [job for job in taking.result() if not job.dropped] if taking.done() else []
        if dying.done():
            for job in reversed(batch):
                self.waiting.add(job, first=True)
            raise WorkerDied
        self._count()
        if not batch:
            return
        try:
            async with asyncio.timeout(self.options.request_seconds + _GRACE):
                await (self._stream(worker, batch[0]) if batch[0].pieces is not None else self._texts(worker, batch))
        except BaseException as error:
            for job in batch:
                self._again(job)
            if isinstance(error, asyncio.CancelledError):
                raise
            if not isinstance(error, (WorkerDied, TimeoutError)):
                _log.exception("a worker's answer could not be read")
            raise WorkerDied from error

    def _again(self, job: Job) -> None:
        """Let a job wait anew whose worker has died, or say so."""
        if job.dropped:
            return
        job.tries, job.alone = job.tries + 1, True
        if job.tries >= TRIES or job.started:
            fail(
                job,
                ApiError(500, "The worker that computed this has ended; the request was not answered.", "worker_died"),
            )
        else:
            self.waiting.add(job, first=True)

    async def _texts(self, worker: _Worker, batch: list[Job]) -> None:
        self._numbers += 1
        number = self._numbers
        self.metrics.batch_texts.observe(len(batch))
        self.metrics.padded.inc(len(batch) * max(job.tokens for job in batch))
        await worker.send({"id": number, "rows": [job.work for job in batch]})
        message, rows = await worker.read()
        if message.get("id") != number:
            raise WorkerDied
        if "error" in message or rows is None or len(rows) != len(batch):
            said = message.get("error", "the worker's answer has another length")
            for job in batch:
                fail(job, ApiError(500, f"The model could not compute this: {said}", "model_failed"))
            return
        for job, row, finite in zip(batch, rows, np.isfinite(rows).all(1), strict=True):
            if not finite:
                fail(job, ApiError(500, "The model's answer is not finite for a text of this request.", "not_finite"))
            elif not job.future.done():
                job.future.set_result(row)

    async def _stream(self, worker: _Worker, job: Job) -> None:
        self._numbers += 1
        number, pieces = self._numbers, job.pieces
        assert pieces is not None
        await worker.send({"id": number, "asked": job.work})
        cancel = asyncio.ensure_future(_when_dropped(worker, job, number))
        try:
            while True:
                message, _ = await worker.read()
                if message.get("id") != number:
                    raise WorkerDied
                if "error" in message:
                    fail(job, ApiError(500, f"The model could not compute this: {message['error']}", "model_failed"))
                    return
                job.started = job.started or bool(message.get("text"))
                pieces.put_nowait(message)
                if "end" in message:
                    if not job.future.done():
                        job.future.set_result(None)
                    return
        finally:
            cancel.cancel()

    def _count(self) -> None:
        self.metrics.waiting.set(len(self.waiting))
        self.metrics.workers.set(self.ready)


async def _when_dropped(worker: _Worker, job: Job, number: int) -> None:
    await asyncio.wait({job.future})
    if job.future.cancelled():
        await worker.send({"cancel": number})


def fail(job: Job, error: ApiError) -> None:
    """Answer a job by an error, unless it has been answered."""
    if not job.future.done():
        job.future.set_exception(error)
        if job.pieces is not None:
            job.pieces.put_nowait({})  # wakes who waits for the next piece


def _environment(threads: int) -> dict[str, str]:
    """Return a worker's environment: its threads, none of which spins, and not the server's key."""
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    return {name: value for name, value in os.environ.items() if name != "NOGEMM_API_KEY"} | VARIABLES | own
