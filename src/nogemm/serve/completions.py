"""`/v1/completions` and `/v1/chat/completions`, whole or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from nogemm.serve.answers import body_of, json_response, within
from nogemm.serve.decoder_engine import Asked
from nogemm.serve.errors import ApiError, invalid
from nogemm.serve.requests import CompletionRequest, completion_request
from nogemm.serve.service import Service
from nogemm.serve.waiting import Job


class Completions:
    """The paths of decoders."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def text(self, request: Request) -> Response:
        """Continue prompts."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer a chat, in the model's own template."""
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        service, options = self.service, self.service.options
        asked = completion_request(await body_of(request, options), service.name, options.request_texts, chat=chat)
        form = _Form(service.name, chat)
        if not asked.stream:
            return json_response(await within(request, options, self._whole(asked, form)))
        deadline = asyncio.get_running_loop().time() + options.request_seconds
        job, first = await within(request, options, self._begun(asked))
        pieces = self._pieces(job, first, deadline)
        events = self._events(job, pieces, asked, form)
        return _Stream(events, media_type="text/event-stream", end=lambda: self.service.pool.drop([job]))

    async def _jobs(self, asked: CompletionRequest) -> list[Job]:
        """Return the completions that are asked for, within the limits.

        Raises:
            ApiError: a prompt is empty or too long, or a setting is not offered.
        """
        tokens, options, facts = self.service.tokens, self.service.options, self.service.pool.facts
        field = "messages" if asked.messages else "prompt"
        if asked.messages:
            prompts = [await tokens.chat(asked.messages)]
        else:
            prompts = [await tokens.prompt(text) for text in asked.prompts]
        if asked.top_p is not None and asked.temperature and "top_p" not in facts["samples"]:
            raise ApiError(
                400, "top_p is not offered by an exported decoder; leave it out.", "not_offered", param="top_p"
            )
        if sum(map(len, prompts)) > options.request_tokens:
            raise ApiError(
                400,
                f"The request has {sum(map(len, prompts))} tokens, and {options.request_tokens} are allowed.",
                "too_many_tokens",
                param=field,
            )
        return [self._job(asked, ids, field) for ids in prompts]

    def _job(self, asked: CompletionRequest, ids: list[int], field: str) -> Job:
        most, places = self.service.options.new_tokens, self.service.pool.facts["positions"]
        if not ids:
            raise invalid(f"{field} has no token.", field)
        room = most if places is None else min(most, places - len(ids))
        if room < 1:
            raise invalid(f"{field} has {len(ids)} tokens, and the model has {places} positions.", field)
        if asked.new_tokens is not None and asked.new_tokens > room:
            why = (
                f"{most} are allowed" if room == most else f"behind {len(ids)} of {field} the model has room for {room}"
            )
            raise invalid(f"max_tokens is {asked.new_tokens}, and {why}.", "max_tokens")
        work = Asked(
            ids=ids,
            new_tokens=asked.new_tokens or room,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            stops=asked.stops,
        )
        return Job(asdict(work), len(ids), streams=True)

    async def _whole(self, asked: CompletionRequest, form: _Form) -> dict[str, Any]:
        jobs = await self._jobs(asked)
        try:
            self.service.pool.add(jobs)
            await asyncio.gather(*(job.future for job in jobs))
        except BaseException:
            self.service.pool.drop(jobs)
            raise
        choices, new = [], 0
        for index, job in enumerate(jobs):
            pieces = _rest(job)
            new += sum(piece.get("tokens", 0) for piece in pieces)
            choices.append(form.choice(index, "".join(piece.get("text", "") for piece in pieces), pieces[-1]["end"]))
        return form.head() | {"choices": choices, "usage": self._usage(jobs, new)}

    async def _begun(self, asked: CompletionRequest) -> tuple[Job, dict[str, Any]]:
        """Let a completion wait; return it with its first piece, before which an error still has a status."""
        (job,) = await self._jobs(asked)
        assert job.pieces is not None
        try:
            self.service.pool.add([job])
            return job, _checked(job, await job.pieces.get())
        except BaseException:
            self.service.pool.drop([job])
            raise

    async def _pieces(self, job: Job, first: dict[str, Any], deadline: float) -> AsyncIterator[dict[str, Any]]:
        assert job.pieces is not None
        piece = first
        while True:
            yield piece
            if "end" in piece:
                return
            try:
                async with asyncio.timeout_at(deadline):
                    piece = _checked(job, await job.pieces.get())
            except TimeoutError:
                seconds = self.service.options.request_seconds
                raise ApiError(504, f"The answer was not complete after {seconds:g} s.", "request_timeout") from None

    async def _events(
        self, job: Job, pieces: AsyncIterator[dict[str, Any]], asked: CompletionRequest, form: _Form
    ) -> AsyncIterator[bytes]:
        """Yield server-sent events; an error behind the first is an event itself, and the last."""
        new = 0
        try:
            if form.chat:
                yield _event(form.chunk({"role": "assistant", "content": ""}, None))
            async for piece in pieces:
                new += piece.get("tokens", 0)
                if piece.get("text"):
                    yield _event(form.chunk(piece["text"], None))
                if "end" in piece:
                    yield _event(form.chunk("", piece["end"]))
            usage = self._usage([job], new)
            if asked.usage:
                yield _event(form.head("chunk") | {"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body)

    def _usage(self, jobs: Sequence[Job], new: int) -> dict[str, int]:
        prompt = sum(job.tokens for job in jobs)
        self.service.metrics.texts.inc(len(jobs))
        self.service.metrics.prompt_tokens.inc(prompt)
        self.service.metrics.new_tokens.inc(new)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


class _Stream(StreamingResponse):
    """A stream that says when it ends, also before its first event."""

    def __init__(self, events: AsyncIterator[bytes], *, media_type: str, end: Callable[[], None]) -> None:
        super().__init__(events, media_type=media_type)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._end()


class _Form:
    """The shape of one answer."""

    def __init__(self, model: str, chat: bool) -> None:
        self.model, self.chat = model, chat
        self.id, self.created = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())

    def head(self, part: str = "") -> dict[str, Any]:
        kind = ("chat.completion" + (f".{part}" if part else "")) if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def choice(self, index: int, text: str, ended: str) -> dict[str, Any]:
        answer = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **answer, "logprobs": None, "finish_reason": ended}

    def chunk(self, text: str | dict[str, str], ended: str | None) -> dict[str, Any]:
        if self.chat:
            delta = text if isinstance(text, dict) else {"content": text} if text else {}
            choice: dict[str, Any] = {"index": 0, "delta": delta, "finish_reason": ended}
        else:
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": ended}
        return self.head("chunk") | {"choices": [choice]}


def _event(found: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(found) + b"\n\n"


def _checked(job: Job, piece: dict[str, Any]) -> dict[str, Any]:
    if not piece:
        error = job.future.exception()
        raise error if error is not None else ApiError(500, "The completion has ended without a word.", "model_failed")
    return piece


def _rest(job: Job) -> list[dict[str, Any]]:
    """Return the pieces of a completion that has ended."""
    assert job.pieces is not None
    found = []
    while not job.pieces.empty():
        found.append(job.pieces.get_nowait())
    return found
