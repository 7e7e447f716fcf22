"""Bodies of requests: read, or refused in a sentence, whatever they hold."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from nogemm.serve.errors import ApiError
from nogemm.serve.frames import HEAD, lengths, pack_frame, unpack_frame
from nogemm.serve.requests import completion_request, embed_request, rerank_request

MODEL, TEXTS = "m", 4
READERS: list[tuple[Callable[[bytes], Any], dict[str, Any]]] = [
    (
        lambda body: embed_request(body, MODEL, TEXTS),
        {"input": ["a", "b"], "model": MODEL, "encoding_format": "base64", "dimensions": 3, "truncate": True},
    ),
    (
        lambda body: rerank_request(body, MODEL, TEXTS),
        {"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1, "return_documents": True, "truncate": False},
    ),
    (
        lambda body: completion_request(body, MODEL, TEXTS, chat=False),
        {"prompt": "a", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 1, "stop": ["x"], "n": 1},
    ),
    (
        lambda body: completion_request(body, MODEL, TEXTS, chat=True),
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "b", "refusal": None},
                {"role": "user", "content": "c"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "presence_penalty": 0.0,
            "tools": [],
        },
    ),
]
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**63,
    1.5,
    1e308,
    "",
    "a",
    "\0",
    [],
    [None],
    [[]],
    ["a"] * 9,
    {},
    {"": 0},
]


@pytest.mark.parametrize(("read", "body"), READERS)
def test_what_is_right_is_read(read: Callable[[bytes], Any], body: dict[str, Any]) -> None:
    assert read(json.dumps(body).encode()) is not None
    with pytest.raises(ApiError) as refused:
        read(json.dumps(body | {"what": 1}).encode())
    assert (refused.value.status, refused.value.param) == (400, "what")


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path to every value within a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inside for found in places(one, (*path, key)))]


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a copy with another value at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = changed(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize(("read", "body"), READERS)
def test_whatever_a_body_holds_it_is_read_or_refused(read: Callable[[bytes], Any], body: dict[str, Any]) -> None:
    bodies = [json.dumps(changed(body, path, new)).encode() for path in places(body) for new in VALUES]
    chance = random.Random(0)
    whole = json.dumps(body).encode()
    for _ in range(3000):
        cut = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            cut[chance.randrange(len(cut))] = chance.randrange(256)
        bodies.append(bytes(cut[: chance.randint(1, len(cut))]) if chance.random() < 0.3 else bytes(cut))
    refusals: list[ApiError] = []
    for one in bodies:
        try:
            read(one)
        except ApiError as error:
            refusals.append(error)
    assert all(400 <= error.status < 500 and error.message.endswith(".") for error in refusals)
    assert len(refusals) > len(bodies) // 2


def test_values_that_change_the_answer_are_not_taken_for_neutral_ones() -> None:
    read, body = READERS[2]
    for name, value in (("n", True), ("n", 2), ("echo", 0), ("logprobs", True), ("presence_penalty", 0.1)):
        with pytest.raises(ApiError, match=f"{name} is not offered here"):
            read(json.dumps(body | {name: value}).encode())


def test_frames_are_read_as_they_were_written() -> None:
    import numpy as np

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    for given in (None, array, array[:, :0]):
        frame = pack_frame({"id": 3, "text": "é"}, given)
        words, data = lengths(frame[: HEAD.size])
        assert len(frame) == HEAD.size + words + data
        message, found = unpack_frame(frame[HEAD.size :][:words], frame[HEAD.size + words :])
        assert (message["id"], message["text"]) == (3, "é")
        assert (found is None) == (given is None)
        assert found is None or given is None or np.array_equal(found, given)
    with pytest.raises(EOFError):
        lengths(b"\xff" * HEAD.size)
