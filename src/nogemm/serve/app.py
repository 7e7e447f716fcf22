"""The server as an ASGI application: who may ask, what is answered, and by which path.

Reading order: `create_app`, `ServeApp` (every request passes it), `_Paths`.
"""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from nogemm.errors import NogemmError
from nogemm.serve.answers import json_response
from nogemm.serve.completions import Completions
from nogemm.serve.errors import ApiError
from nogemm.serve.options import ServeOptions, is_loopback
from nogemm.serve.page import page
from nogemm.serve.service import Service
from nogemm.serve.texts import Texts

_log = logging.getLogger("nogemm.serve")
_OPEN = ("/", "/health")  # without a key: nothing of the model is in them
_COMMON = {b"x-content-type-options": b"nosniff", b"cache-control": b"no-store"}


def create_app(options: ServeOptions) -> ServeApp:
    """Make the server of a model, for uvicorn or another ASGI server to run; its workers start with its lifespan.

    Raises:
        ConfigError: there is no model, or it does not do what `options.task` says.
        CheckpointError: a file of it is damaged.
    """
    return ServeApp(Service(options))


class ServeApp:
    """An ASGI application that serves one model.

    Attributes:
        service: its model, workers and figures.
        failure: why its workers did not start.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.failure: NogemmError | None = None
        self._inner = Starlette(
            routes=_routes(service),
            lifespan=self._lifespan,
            exception_handlers={ApiError: _refused, HTTPException: _no_such_path},
        )
        self._paths = {route.path for route in self._inner.routes if isinstance(route, Route)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request. Whatever is raised on the way is an answer, too."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        metrics, start, status = self.service.metrics, time.perf_counter(), 0
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", []), *_COMMON.items()]}
            await send(message)

        metrics.active.inc()
        self.service.active += 1
        try:
            self._admit(Request(scope))
            await self._inner(scope, receive, sending)
        except ApiError as error:
            await _answer(error)(scope, receive, sending)
        except ClientDisconnect:
            status = 499
        except Exception:
            _log.exception("%s failed", path)
            if not status:
                failure = ApiError(500, "The server has failed at this request.", "internal_error")
                await _answer(failure)(scope, receive, sending)
            else:
                raise
        finally:
            self.service.active -= 1
            metrics.active.dec()
            metrics.requests.labels(path, str(status or 499)).inc()
            metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _admit(self, request: Request) -> None:
        """Refuse who may not ask, and more requests than the server takes at a time.

        Raises:
            ApiError: no key, or another; the name of a foreign site; too many requests.
        """
        options = self.service.options
        if request.url.path in _OPEN and request.method in ("GET", "HEAD"):
            return
        if options.api_key is not None:
            given = request.headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + options.api_key.encode()):
                raise ApiError(401, "This server needs its API key: Authorization: Bearer KEY.", "invalid_api_key")
        elif not is_loopback(_host(request.headers.get("host", ""))):
            # A page of a foreign site, whose name leads here, must not read what a server without a key answers.
            raise ApiError(
                403, "Without an API key this server answers to 127.0.0.1 and localhost alone.", "foreign_host"
            )
        if self.service.active > options.requests:
            raise ApiError(
                503,
                f"More than {options.requests} requests are at work; try again in a moment.",
                "too_busy",
                retry=True,
            )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        try:
            await self.service.start()
        except NogemmError as error:
            self.failure = error
            raise
        try:
            yield
        finally:
            await self.service.stop()


def _host(header: str) -> str:
    name = header.rpartition("]")[0].removeprefix("[") if header.startswith("[") else header.partition(":")[0]
    return name.lower()


def _routes(service: Service) -> list[Route]:
    paths = _Paths(service)
    routes = [
        Route("/", paths.page, methods=["GET"]),
        Route("/health", paths.health, methods=["GET"]),
        Route("/metrics", paths.metrics, methods=["GET"]),
        Route("/v1/models", paths.models, methods=["GET"]),
    ]
    texts, completions = Texts(service), Completions(service)
    tasks: dict[str, dict[str, Callable[[Request], Awaitable[Response]]]] = {
        "embed": {"/v1/embeddings": texts.embeddings},
        "rerank": {"/v1/rerank": texts.rerank, "/rerank": texts.rerank},
        "generate": {"/v1/completions": completions.text, "/v1/chat/completions": completions.chat},
    }
    for task, posted in tasks.items():
        for path, function in posted.items():
            what = function if task == service.kind.task else _other_task(task, service.kind.task)
            routes.append(Route(path, what, methods=["POST"]))
    return routes


def _other_task(task: str, own: str) -> Callable[[Request], Awaitable[Response]]:
    async def refuse(request: Request) -> Response:
        raise ApiError(404, f"This server has a model to {own}; to {task}, another one is needed.", "wrong_task")

    return refuse


class _Paths:
    """What is asked about the server itself."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def page(self, request: Request) -> Response:
        html, policy = page()
        return Response(html, media_type="text/html", headers={"content-security-policy": policy})

    async def health(self, request: Request) -> Response:
        """200 while a worker has a model; else 503."""
        ready, workers = self.service.pool.ready, self.service.options.workers
        found = {"status": "ok" if ready else "no worker", "ready": ready, "workers": workers}
        return json_response(found, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self.service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        one = {"id": self.service.name, "object": "model", "created": self.service.created, "owned_by": "nogemm"}
        about = {"task": self.service.kind.task, "limits": self.service.options.limits(), **self.service.pool.facts}
        return json_response({"object": "list", "data": [one | {"nogemm": about}]})


def _answer(error: ApiError) -> Response:
    headers = {"retry-after": "1"} if error.retry else {}
    if error.status in (408, 413):
        headers["connection"] = "close"  # what is left of the body is not read
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error.body, error.status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _answer(error)


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        return _answer(ApiError(405, f"This path does not take {request.method}.", "method_not_allowed"))
    return _answer(ApiError(error.status_code, "There is no such path here.", "not_found"))
