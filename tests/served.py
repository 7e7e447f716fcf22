"""A server as its users meet it: a process, a socket, and JSON."""

from __future__ import annotations

import http.client
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

PATIENCE = 1500.0  # seconds: a machine may stand still; nothing here measures time
HEADERS = {"Content-Type": "application/json"}
Answer = tuple[int, Any]


class Served:
    """`nogemm serve` on a free port."""

    def __init__(self, model: Path, *words: object, **env: str) -> None:
        command = [sys.executable, "-m", "nogemm", "serve", str(model), "--port", "0", *map(str, words)]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"} | env
        )
        self.lines: list[str] = []
        self.port = self._port()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.ended()

    def _port(self) -> int:
        assert self.process.stderr is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stderr, selectors.EVENT_READ)
            while selector.select(PATIENCE):
                line = self.process.stderr.readline()
                if not line:
                    break
                self.lines.append(line)
                if found := re.search(r" at http://127\.0\.0\.1:(\d+)", line):
                    return int(found.group(1))
        self.process.kill()
        raise AssertionError("".join(self.lines) or "the server said nothing")

    def workers(self) -> list[psutil.Process]:
        """Return the processes that have the model."""
        return psutil.Process(self.process.pid).children()

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        """Send one request, bytes as they are or anything else as JSON; return status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("GET" if data is None else "POST", path, data, HEADERS | (headers or {}))
            answer = connection.getresponse()
            text = answer.read()
            kind = answer.getheader("content-type", "")
            return answer.status, json.loads(text) if kind == "application/json" else text.decode()
        finally:
            connection.close()

    def together(self, path: str, bodies: list[Any], at_once: int) -> list[Answer]:
        """Send requests, so many at a time; return the answers in the order of the bodies."""
        with ThreadPoolExecutor(at_once) as threads:
            return list(threads.map(lambda body: self.ask(path, body), bodies))

    def connect(self) -> socket.socket:
        """Open a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def figure(self, name: str) -> float:
        """Return one of the server's metrics."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.ask("/metrics")[1], re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Stop the server by a signal; return its exit code."""
        self.process.send_signal(number)
        return self.ended()

    def ended(self) -> int:
        """Wait for its end."""
        try:
            _, rest = self.process.communicate(timeout=PATIENCE)
        finally:
            self.process.kill()
        self.lines.append(rest)
        return self.process.returncode


def wait_until(true: Callable[[], bool], what: str) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def received(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes; a reset is a close."""
    found = b""
    try:
        while data := connection.recv(65536):
            found += data
    except ConnectionError:
        pass
    return found


def events(text: str) -> list[Any]:
    """Return the JSON of server-sent events; the last word as it is."""
    found = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in found]
