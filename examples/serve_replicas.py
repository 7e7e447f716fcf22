"""Two replicas of a served model behind a small balancer, asked while one of them is stopped.

python examples/serve_replicas.py MODEL [--port 8000]

The balancer hands each connection to the replica with the fewest of them, and to the other one where a replica is gone.
haproxy.cfg and nginx.conf in this directory do the same for work.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator


class Replica:
    """A server of its own, with a part of the machine's cores."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process, self.port, self.open = process, port, 0

    @staticmethod
    async def start(model: str) -> Replica:
        command = [sys.executable, "-m", "nogemm", "serve", model, "--port", "0", "--threads", "1"]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        assert process.stderr is not None
        async for line in process.stderr:
            if found := re.search(rb" at http://127\.0\.0\.1:(\d+)", line):
                return Replica(process, int(found.group(1)))
        raise SystemExit("a replica has ended")

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.communicate()


class Balancer:
    """Copies bytes between clients and replicas."""

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas = replicas

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for replica in sorted(self.replicas, key=lambda one: one.open):
            with contextlib.suppress(ConnectionError):
                there = await asyncio.open_connection("127.0.0.1", replica.port)
                replica.open += 1
                try:
                    await asyncio.gather(copied(reader, there[1]), copied(there[0], writer))
                finally:
                    replica.open -= 1
                return
        writer.close()


async def copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until one side closes, then close the other."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def ask(port: int, texts: list[str]) -> int:
    """Ask for embeddings over a connection of its own; return how many came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"input": texts}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    head_, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return len(json.loads(answer)["data"]) if b" 200 " in head_.splitlines()[0] else 0


@contextlib.asynccontextmanager
async def replicas_of(model: str) -> AsyncIterator[list[Replica]]:
    started = list(await asyncio.gather(Replica.start(model), Replica.start(model)))
    try:
        yield started
    finally:
        await asyncio.gather(*(replica.stop() for replica in started))


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of a sentence encoder, converted or not, or its export")
    parser.add_argument("--port", type=int, default=8000, help="of the balancer; 0: a free one")
    args = parser.parse_args()

    async with replicas_of(args.model) as replicas:
        server = await asyncio.start_server(Balancer(replicas).connected, "127.0.0.1", args.port)
        port = server.sockets[0].getsockname()[1]
        print(f"two replicas behind http://127.0.0.1:{port}")
        asked = [asyncio.create_task(ask(port, ["a text", f"text number {i}"])) for i in range(40)]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        await replicas[0].stop()  # it answers what it took
        print(f"{sum([await one for one in asked])} of 80 embeddings, one replica stopped meanwhile")
        print(f"{await ask(port, ['a text'])} of 1 by the other one")
        server.close()


if __name__ == "__main__":
    asyncio.run(main())
