"""The server in this process: a socket, uvicorn, and what uvicorn leaves open against slow senders."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import h11
import orjson
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nogemm.errors import ConfigError
from nogemm.serve.app import create_app
from nogemm.serve.errors import ApiError
from nogemm.serve.options import ServeOptions

_LAST_WORDS = 0.2  # seconds


def run_server(options: ServeOptions, ready: Callable[[str], None] | None = None) -> None:
    """Serve a model until SIGTERM or Ctrl-C, then answer what was taken, refuse what is new, and return.

    Each worker is a process of its own. uvicorn raises the signal that stopped it again before this returns, so that
    the caller's own handler runs.

    Args:
        options: what is served, and where.
        ready: called with the server's URL once its workers have loaded.
    Raises:
        ConfigError: there is no model, or the address is not to be had.
        CheckpointError: a file of the model is damaged.
        NogemmError: a worker cannot load it.
    """
    app = create_app(options)
    listening = _listen(options)
    config = uvicorn.Config(
        app,
        http=_connection(options),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(options.request_seconds) + 10,
    )
    server = _Server(config, _url(options.host, listening), ready)
    try:
        asyncio.run(server.serve(sockets=[listening]))
    except SystemExit:
        if app.failure is None:
            raise
        raise app.failure from None
    finally:
        listening.close()


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config, url: str, ready: Callable[[str], None] | None) -> None:
        super().__init__(config)
        self._url, self._ready = url, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None and self.started:
            self._ready(self._url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        await asyncio.sleep(_LAST_WORDS)  # requests that have come and were not read yet are still taken
        await super().shutdown(sockets)


def _listen(options: ServeOptions) -> socket.socket:
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(options.host).version == 6 else socket.AF_INET
    except ValueError:  # a name
        family = socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        said = error.strerror or str(error)
        raise ConfigError(f"serve: cannot listen on {options.host}, port {options.port}: {said}") from error


def _url(host: str, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _connection(options: ServeOptions) -> type[H11Protocol]:
    """Make uvicorn's connection with limits on time and number, which it has not."""
    seconds, most = options.receive_seconds, options.connections

    class Connection(H11Protocol):
        """A connection that is closed when a request's head takes too long, or when its reader stands still."""

        _head: asyncio.TimerHandle | None = None
        _reader: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.abort()
            else:
                self._head = self.loop.call_later(seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._head = _off(self._head)
            elif self._head is None and not self.transport.is_closing():
                self._head = self.loop.call_later(seconds, self._late)

        def on_response_complete(self) -> None:
            self._head = _off(self._head)
            super().on_response_complete()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._reader = self.loop.call_later(seconds, self.transport.abort)

        def resume_writing(self) -> None:
            self._reader = _off(self._reader)
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._head, self._reader = _off(self._head), _off(self._reader)
            super().connection_lost(exc)

        def _late(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()

        def send_400_response(self, msg: str) -> None:
            error = ApiError(400, "This is no HTTP request that the server can read.", "invalid_http")
            body = orjson.dumps(error.body)
            headers = [
                ("content-type", "application/json"),
                ("connection", "close"),
                ("content-length", str(len(body))),
            ]
            events = (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage())
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

    return Connection


def _off(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
