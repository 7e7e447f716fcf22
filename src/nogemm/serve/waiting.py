"""Texts that wait for a worker, and which of them go together.

A batch holds the text that has waited longest, so none waits for ever, and those next to it in length, so that little
is padded. A worker that is free takes what is there: nothing waits for a batch to fill.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import OrderedDict
from itertools import count
from typing import Any


class Job:
    """One text, or one completion, on its way through a worker.

    Args:
        work: what the worker is told, as JSON.
        tokens: of the text.
    Attributes:
        future: its answer; done, too, where nobody waits any more.
        pieces: of a completion, as they come; None: a text, answered at once.
        tries: how often a worker has died of the batch that it was in.
        alone: that it goes without others: one of a batch that a worker died of.
    """

    _numbers = count(1)

    def __init__(self, work: dict[str, Any], tokens: int, *, streams: bool = False) -> None:
        self.number = next(self._numbers)
        self.work, self.tokens = work, tokens
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.pieces: asyncio.Queue[dict[str, Any]] | None = asyncio.Queue() if streams else None
        self.started, self.alone, self.tries = False, streams, 0

    @property
    def dropped(self) -> bool:
        """Whether nobody waits for the answer."""
        return self.future.done()


class Waiting:
    """Jobs in the order of their coming, and in that of their length.

    Args:
        texts, tokens: of a batch, padding included.
    """

    def __init__(self, texts: int, tokens: int) -> None:
        self.texts, self.tokens = texts, tokens
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._sorted: list[tuple[int, int]] = []
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job, *, first: bool = False) -> None:
        """Let a job wait; `first` puts it before all others."""
        self._jobs[job.number] = job
        if first:
            self._jobs.move_to_end(job.number, last=False)
        if not job.alone:
            insort(self._sorted, (job.tokens, job.number))
        self._changed.set()

    def remove(self, job: Job) -> None:
        """Let go of a job, if it is still here."""
        if self._jobs.pop(job.number, None) is not None and not job.alone:
            del self._sorted[bisect_left(self._sorted, (job.tokens, job.number))]

    async def take(self) -> list[Job]:
        """Return the next batch, at least one job; wait for it."""
        while not self._jobs:
            self._changed.clear()
            await self._changed.wait()
        oldest = next(iter(self._jobs.values()))
        batch = [oldest] if oldest.alone else self._around(oldest)
        for job in batch:
            self.remove(job)
        return batch

    def _around(self, oldest: Job) -> list[Job]:
        """Return the oldest job and its neighbours in length, the nearest first, as many as fit."""
        low = bisect_left(self._sorted, (oldest.tokens, oldest.number))
        high, longest = low + 1, max(1, oldest.tokens)
        while high - low < self.texts:
            below = oldest.tokens - self._sorted[low - 1][0] if low else None
            above = self._sorted[high][0] - oldest.tokens if high < len(self._sorted) else None
            if below is None and above is None:
                break
            up = below is None or (above is not None and above <= below)
            grown = max(longest, self._sorted[high][0]) if up else longest
            if grown * (high - low + 1) > self.tokens:
                if not up or low == 0:
                    break
                up, grown = False, longest  # longer ones cost too much: shorter ones may still fit
                if grown * (high - low + 1) > self.tokens:
                    break
            low, high, longest = (low, high + 1, grown) if up else (low - 1, high, grown)
        return [self._jobs[number] for _, number in self._sorted[low:high]]
