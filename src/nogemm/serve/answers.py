"""Answers as bytes, and bodies as they come: within their size and their time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from nogemm.serve.errors import ApiError
from nogemm.serve.options import ServeOptions

T = TypeVar("T")
_DRAINED = 16  # times the limit: so much of a body is read and dropped before its sender is told, and cut off


def json_response(found: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an answer of JSON; float32 numbers are written with as many digits as tell them apart."""
    body = orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(body, status, media_type="application/json", headers=headers)


async def body_of(request: Request, options: ServeOptions) -> bytes:
    """Read a request's body.

    Raises:
        ApiError: it is no JSON by its own word (415), too large (413), or comes too slowly (408).
        ClientDisconnect: nobody is there any more.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, "The request must have the header Content-Type: application/json.", "unsupported_media_type"
        )
    large = ApiError(413, f"The body has more than {options.body_bytes} bytes.", "body_too_large")
    told = request.headers.get("content-length", "")
    announced = int(told) if told.isdecimal() and len(told) < 20 else 0
    if announced > options.body_bytes and (announced > _DRAINED * options.body_bytes or "expect" in request.headers):
        raise large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(options.receive_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= options.body_bytes:
                    chunks.append(chunk)
                elif size > _DRAINED * options.body_bytes:
                    break
    except TimeoutError:
        if size <= options.body_bytes:
            seconds = options.receive_seconds
            raise ApiError(408, f"The body had not come after {seconds:g} s.", "receive_timeout") from None
    if size > options.body_bytes:
        raise large
    return b"".join(chunks)


async def within(request: Request, options: ServeOptions, work: Coroutine[Any, Any, T]) -> T:
    """Run a request's work until its time is over or its sender has gone; it is cancelled then.

    Raises:
        ApiError: 504, its time is over.
        ClientDisconnect: nobody waits for the answer.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=options.request_seconds, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        task.cancel()
        await asyncio.wait({task})
    finally:
        task.cancel()
        gone.cancel()
    if gone in done:
        raise ClientDisconnect
    seconds = options.request_seconds
    raise ApiError(504, f"The answer was not there after {seconds:g} s.", "request_timeout", retry=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
