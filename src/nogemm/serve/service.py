"""What all paths of one server share: the model's kind, its tokenizer, its workers, its figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from nogemm.models.loading import load_tokenizer
from nogemm.serve.kind import kind_of, own_code_refused
from nogemm.serve.metrics import Metrics
from nogemm.serve.options import ServeOptions
from nogemm.serve.pool import Pool
from nogemm.serve.tokens import Row, Tokens
from nogemm.serve.waiting import Job


class Service:
    """A model that is served.

    Args:
        options: of the server.
    Raises:
        ConfigError, CheckpointError: there is no model, or not of the task that is asked for.

    Attributes:
        kind, name: of the model.
        metrics, tokens, pool: figures, tokenizer, workers.
        active: requests at work.
        created: seconds since 1970.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.kind = kind_of(options.model, options.task)
        self.name = options.served_name
        self.metrics = Metrics()
        with own_code_refused(options.model):
            self.tokens = Tokens(load_tokenizer(self.kind.folder), options.request_tokens)
        self.active = 0
        self.created = int(time.time())
        self.pool: Any = None

    async def start(self) -> None:
        """Start the workers; raises NogemmError where one cannot load the model."""
        self.pool = Pool(self.kind, self.options, self.metrics)
        await self.pool.start()

    async def stop(self) -> None:
        """End the workers."""
        await self.pool.stop()
        self.tokens.close()

    async def rows(self, rows: Sequence[Row]) -> list[NDArray[Any]]:
        """Return the model's answers to tokenised texts, in their order."""
        jobs = [Job(dict(row), len(row["input_ids"])) for row in rows]
        try:
            self.pool.add(jobs)
            found = await asyncio.gather(*(job.future for job in jobs))
        except BaseException:
            self.pool.drop(jobs)
            raise
        self.metrics.texts.inc(len(rows))
        self.metrics.prompt_tokens.inc(count(rows))
        return list(found)


def count(rows: Sequence[Row]) -> int:
    """Return the tokens of texts, padding left out."""
    return sum(len(row["input_ids"]) for row in rows)
