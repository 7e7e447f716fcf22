"""Memory of a server under load: flat, in the server and in its worker."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import psutil
import pytest
from test_server import drop_connections, texts_of

from served import Served

EMBED = "/v1/embeddings"
SECONDS = float(os.environ.get("NOGEMM_SERVE_SECONDS", "0"))  # 3600: an hour
BOUND = 8 << 20  # bytes that a process may grow by behind its first round, whatever follows


@pytest.mark.slow
def test_memory_is_flat(encoder: Path) -> None:
    """Ten rounds of 400 requests, good and bad ones, and of 100 dropped connections; more while SECONDS last."""
    chance = random.Random(0)
    with Served(encoder, "--limit", "body_bytes=20000") as server:
        processes = [psutil.Process(server.process.pid), *server.workers()]
        sizes: list[list[int]] = []
        end = time.monotonic() + SECONDS
        while len(sizes) < 10 or time.monotonic() < end:
            bodies: list[object] = [{"input": texts_of(chance, chance.randint(1, 6))} for _ in range(380)]
            bodies += [b"{" * 100, b"\xff", {"input": "a " * 5000}, b" " * 40_000] * 5
            found = server.together(EMBED, bodies, at_once=8)
            assert [status for status, _ in found[:380]] == [200] * 380
            assert {status for status, _ in found[380:]} == {400, 413}
            drop_connections(server, 100)
            sizes.append([process.memory_info().rss for process in processes])
        growth = [last - max(size[i] for size in sizes[:3]) for i, last in enumerate(sizes[-1])]
        assert max(growth) < BOUND, sizes
        assert server.figure("nogemm_worker_restarts_total") == 0
