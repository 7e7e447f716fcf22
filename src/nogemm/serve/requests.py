"""What requests ask for: every field is read, or refused by name; none is ignored that would change the answer.

Reading order: a class for each path, then `_Fields`, which reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from nogemm.serve.errors import ApiError, invalid

# Fields of OpenAI's that ask for something that there is not here, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False, 0),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "store": (None, False),
    "metadata": (None, {}),
}
_STOPS = 4


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """Texts to embed; answers in base64, or as numbers; texts that are too long cut, or refused."""

    texts: list[str]
    base64: bool
    cut: bool
    dimensions: int | None


@dataclass(frozen=True, kw_only=True)
class RerankRequest:
    """Documents to score against a query; `top`: how many of the best are returned, and whether with their texts."""

    query: str
    documents: list[str]
    top: int
    texts: bool
    cut: bool


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """Prompts, or a chat, to continue."""

    prompts: list[str]
    messages: list[Message]
    new_tokens: int | None
    temperature: float
    top_p: float | None
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    usage: bool


def read_json(body: bytes) -> dict[str, Any]:
    """Return a body's JSON object.

    Raises:
        ApiError: it is none, or no UTF-8.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is no JSON in UTF-8: {error}.", "invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    return found


def embed_request(body: bytes, model: str, texts: int) -> EmbedRequest:
    """Read a body of /v1/embeddings; at most so many texts."""
    given = _Fields(read_json(body), model)
    found = EmbedRequest(
        texts=given.texts("input", texts),
        base64=given.choice("encoding_format", ("float", "base64"), "float") == "base64",
        cut=given.flag("truncate"),
        dimensions=given.whole("dimensions", 1, None),
    )
    given.end()
    return found


def rerank_request(body: bytes, model: str, texts: int) -> RerankRequest:
    """Read a body of /v1/rerank; at most so many documents."""
    given = _Fields(read_json(body), model)
    documents = given.take("documents")
    if isinstance(documents, list):  # Cohere's form, too: objects with a text
        given.put(
            "documents", [one["text"] if isinstance(one, dict) and set(one) == {"text"} else one for one in documents]
        )
    else:
        given.put("documents", documents)
    found = RerankRequest(
        query=given.text("query"),
        documents=given.texts("documents", texts),
        top=given.whole("top_n", 1, None) or texts,
        texts=given.flag("return_documents"),
        cut=given.flag("truncate"),
    )
    given.end()
    return found


def completion_request(body: bytes, model: str, texts: int, *, chat: bool) -> CompletionRequest:
    """Read a body of /v1/completions, or of /v1/chat/completions."""
    given = _Fields(read_json(body), model)
    prompts, messages = ([], given.messages(texts)) if chat else (given.texts("prompt", texts), [])
    newer = given.whole("max_completion_tokens", 1, None) if chat else None
    older = given.whole("max_tokens", 1, None)
    stream = given.flag("stream")
    options = given.take("stream_options")
    if options is not None and not (isinstance(options, dict) and set(options) <= {"include_usage"}):
        raise invalid("stream_options takes include_usage alone.", "stream_options")
    top_p = given.number("top_p", 0.0, 1.0)
    found = CompletionRequest(
        prompts=prompts,
        messages=messages,
        new_tokens=newer or older or (None if chat else 16),
        temperature=given.number("temperature", 0.0, 2.0) or 0.0,
        top_p=None if top_p == 1 else top_p,
        seed=given.whole("seed", 0, 2**63 - 1),
        stops=given.stops(),
        stream=stream,
        usage=bool((options or {}).get("include_usage", False)),
    )
    given.end()
    if found.top_p == 0:
        raise invalid("top_p must be above 0.", "top_p")
    if stream and len(prompts) > 1:
        raise invalid("A stream is of one prompt.", "prompt")
    return found


class _Fields:
    """The fields of a body, each taken once."""

    def __init__(self, given: Mapping[str, Any], model: str) -> None:
        self._given = dict(given)
        self.take("user")
        asked = self.take("model")
        if asked is not None and asked != model:
            raise ApiError(404, f"This server has the model {model!r} alone.", "model_not_found", param="model")

    def take(self, name: str) -> Any:
        return self._given.pop(name, None)

    def put(self, name: str, value: Any) -> None:
        self._given[name] = value

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise invalid(f"{name} must be a text.", name)
        return value

    def texts(self, name: str, most: int) -> list[str]:
        value = self.take(name)
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise invalid(f"{name} must be a text or a list of texts; token ids are not taken.", name)
        if len(value) > most:
            raise invalid(f"{name} has {len(value)} texts, and {most} are allowed.", name)
        return value

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value not in (None, True, False) or isinstance(value, (int, float)) != isinstance(value, bool):
            raise invalid(f"{name} must be true or false.", name)
        return bool(value)

    def choice(self, name: str, known: tuple[str, ...], default: str) -> str:
        value = self.take(name)
        if value is not None and value not in known:
            raise invalid(f"{name} must be one of {', '.join(known)}.", name)
        return value or default

    def whole(self, name: str, least: int, most: int | None) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            raise invalid(f"{name} must be a whole number of at least {least}.", name)
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise invalid(f"{name} must be a number from {least:g} to {most:g}.", name)
        return float(value) if math.isfinite(value) else None

    def stops(self) -> tuple[str, ...]:
        value = self.take("stop")
        listed = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(listed, list) or not all(isinstance(one, str) and one for one in listed):
            raise invalid("stop must be a text or a list of texts that are not empty.", "stop")
        if len(listed) > _STOPS:
            raise invalid(f"stop has {len(listed)} texts, and {_STOPS} are allowed.", "stop")
        return tuple(listed)

    def messages(self, most: int) -> list[Message]:
        value = self.take("messages")
        if not isinstance(value, list) or not 0 < len(value) <= most:
            raise invalid(f"messages must be a list of 1 to {most} messages.", "messages")
        return [_message(index, one) for index, one in enumerate(value)]

    def end(self) -> None:
        """Refuse what is left, unless its value asks for nothing."""
        for name, value in self._given.items():
            if name not in _NEUTRAL:
                raise ApiError(400, f"{name[:64]!r} is no field of this request.", "unknown_field", param=name[:64])
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in _NEUTRAL[name]):
                raise ApiError(400, f"{name} is not offered here; leave it out.", "not_offered", param=name)


def _message(index: int, given: Any) -> Message:
    where = f"messages[{index}]"
    if not isinstance(given, dict) or given.get("role") not in ("system", "developer", "user", "assistant"):
        raise invalid(f"{where} must have a role: system, developer, user or assistant.", "messages")
    content = given.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise invalid(f"{where} must have a content of text.", "messages")
    if extra := {name for name, value in given.items() if value is not None} - {"role", "content"}:
        raise invalid(f"{where}: {sorted(map(str, extra))[0][:64]!r} is not offered here.", "messages")
    return Message(role="system" if given["role"] == "developer" else given["role"], content=content)
