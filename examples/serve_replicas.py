"""Two replicas of a served model behind a small balancer, asked while one of them is stopped.

python examples/serve_replicas.py MODEL [--port 8000]

The balancer hands connections out in turn; haproxy.cfg and nginx.conf in this directory do the same for work.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
from urllib.request import Request, urlopen


def replica(model: str) -> tuple[subprocess.Popen[str], int]:
    """Start a server of its own with one thread; return it and its port."""
    command = [sys.executable, "-m", "nogemm", "serve", model, "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr or ():
        if found := re.search(r" at http://127\.0\.0\.1:(\d+)", line):
            return process, int(found.group(1))
    raise SystemExit("a replica has ended")


async def copied(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until one side closes, then close the other."""
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


async def connect(ports: list[int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Give a connection to the next replica, or to the other one where that is gone."""
    ports.append(ports.pop(0))
    for port in tuple(ports):
        try:
            there = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionError:
            continue
        await asyncio.gather(copied(reader, there[1]), copied(there[0], writer), return_exceptions=True)
        return
    writer.close()


def ask(port: int, texts: list[str]) -> int:
    """Ask for embeddings; return how many came."""
    body, headers = json.dumps({"input": texts}).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(f"http://127.0.0.1:{port}/v1/embeddings", body, headers)) as answer:
        return len(json.load(answer)["data"])


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="directory of a sentence encoder, converted or not, or its export")
    parser.add_argument("--port", type=int, default=8000, help="of the balancer; 0: a free one")
    args = parser.parse_args()

    (first, one), (second, other) = replica(args.model), replica(args.model)
    ports = [one, other]
    server = await asyncio.start_server(lambda *streams: connect(ports, *streams), "127.0.0.1", args.port)
    port = server.sockets[0].getsockname()[1]
    print(f"two replicas behind http://127.0.0.1:{port}")
    asked = [asyncio.to_thread(ask, port, ["a text", f"text number {i}"]) for i in range(40)]
    asyncio.get_running_loop().call_later(0.05, first.terminate)  # it answers what it took
    try:
        print(f"{sum(await asyncio.gather(*asked))} of 80 embeddings, one replica stopped meanwhile")
        print(f"{await asyncio.to_thread(ask, port, ['a text'])} of 1 by the other one")
    finally:
        first.terminate()
        second.terminate()


if __name__ == "__main__":
    asyncio.run(main())
