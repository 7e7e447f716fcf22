"""A served encoder, asked as its users ask it, and as those do who mean it harm."""

from __future__ import annotations

import base64
import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import people
from nogemm.models.embed import embed
from nogemm.models.loading import load_encoder, load_tokenizer
from served import Served, received, wait_until

BOUND = 1e-5  # of a number of an embedding: padding and the order of sums
EMBED = "/v1/embeddings"


def vectors(answer: tuple[int, Any]) -> np.ndarray:
    status, found = answer
    assert status == 200, found
    assert [row["index"] for row in found["data"]] == list(range(len(found["data"])))
    return np.array([row["embedding"] for row in found["data"]])


def texts_of(chance: random.Random, count: int) -> list[str]:
    return [" ".join(chance.choices(people.WORDS, k=chance.randint(1, 20))) for _ in range(count)]


def test_embeddings_are_those_of_the_directory(server: Served, encoder: Path) -> None:
    status, found = server.ask(EMBED, {"input": people.TEXTS, "model": "encoder", "user": "somebody"})
    assert np.abs(vectors((status, found)) - people.encoded(encoder)).max() < BOUND
    tokens = sum(len(ids) for ids in load_tokenizer(encoder)(people.TEXTS)["input_ids"])
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (found["object"], found["model"]) == ("list", "encoder")
    short = server.ask(EMBED, {"input": people.TEXTS[0], "encoding_format": "base64", "dimensions": 16})[1]
    decoded = np.frombuffer(base64.b64decode(short["data"][0]["embedding"]), "<f4")
    assert np.abs(decoded - vectors((status, found))[0]).max() < BOUND


def test_many_at_once_get_what_each_would_get_alone(server: Served, encoder: Path) -> None:
    chance = random.Random(0)
    bodies = [{"input": texts_of(chance, chance.randint(1, 6))} for _ in range(120)]
    found = server.together(EMBED, bodies, at_once=16)
    model, tokenizer = load_encoder(encoder), load_tokenizer(encoder)
    for body, answer in zip(bodies, found, strict=True):
        alone = np.concatenate([embed(model, tokenizer, [text]) for text in body["input"]])
        assert np.abs(vectors(answer) - alone).max() < BOUND
        assert answer[1]["usage"]["prompt_tokens"] == sum(map(len, tokenizer(body["input"])["input_ids"]))
    other = np.concatenate([embed(model, tokenizer, [text]) for text in bodies[1]["input"]])
    mixed = vectors(found[0])[:1] - other[:1]
    assert np.abs(mixed).max() > 100 * BOUND  # the comparison sees another text's answer


def test_long_texts_are_refused_or_cut_where_the_request_says_so(server: Served, encoder: Path) -> None:
    long = " ".join(["fast", *["table"] * 60])
    status, found = server.ask(EMBED, {"input": ["a", long]})
    assert status == 400
    assert "input[1] has 63 tokens, and this model takes 30" in found["error"]["message"]
    cut = vectors(server.ask(EMBED, {"input": long, "truncate": True}))
    assert np.abs(cut - people.encoded(encoder, [long])).max() < BOUND


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b'{"input": "\xff\xfe"}', 400, "invalid_json"),
        (b'{"input": "\xed\xa0\x80"}', 400, "invalid_json"),
        (b'{"input": "\\ud800"}', 400, "invalid_json"),
        (b'{"input": NaN}', 400, "invalid_json"),
        (b"[" * 19_000, 400, "invalid_json"),
        (b'{"input": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "invalid_value"),
        (b'{"input": "a", "dimensions": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"input": "a", "dimensions": 18446744073709551615}', 400, "invalid_value"),
        ({}, 400, "invalid_value"),
        ({"input": []}, 400, "invalid_value"),
        ({"input": [1, 2]}, 400, "invalid_value"),
        ({"input": ["a"] * 41}, 400, "invalid_value"),
        ({"input": ["a " * 18] * 40}, 400, "too_many_tokens"),
        ({"input": "a", "dimensions": 8}, 400, "invalid_value"),
        ({"input": "a", "encoding_format": "hex"}, 400, "invalid_value"),
        ({"input": "a", "truncate": 1}, 400, "invalid_value"),
        ({"input": "a", "pooling": "max"}, 400, "unknown_field"),
        ({"input": "a", "model": "gpt-9"}, 404, "model_not_found"),
        ({"input": "a" * 30_000}, 413, "body_too_large"),
        (b" " * 300_000, 413, "body_too_large"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_request_that_is_wrong_is_told_so(server: Served, body: Any, status: int, code: str) -> None:
    found = server.ask(EMBED, body)
    assert (found[0], found[1]["error"]["code"]) == (status, code)
    message = found[1]["error"]["message"]
    assert message.endswith(".")
    assert len(message) < 300
    assert set(found[1]["error"]) == {"message", "type", "param", "code"}
    assert server.ask(EMBED, {"input": "a"})[0] == 200


def test_other_paths_and_kinds(server: Served) -> None:
    assert server.ask("/../../etc/passwd")[0] == 404
    assert server.ask("/v1/embeddings")[0] == 405
    assert server.ask("/v1/rerank", {"query": "a", "documents": ["b"]})[1]["error"]["code"] == "wrong_task"
    assert server.ask("/v1/completions", {"prompt": "a"})[0] == 404
    assert server.ask(EMBED, {"input": "a"}, {"Content-Type": "text/plain"})[0] == 415
    assert server.ask(EMBED, {"input": "a"}, {"Host": "evil.example"})[1]["error"]["code"] == "foreign_host"
    assert server.ask("/health") == (200, {"status": "ok", "ready": 2, "workers": 2})
    (model,) = server.ask("/v1/models")[1]["data"]
    assert (model["id"], model["nogemm"]["task"], model["nogemm"]["max_length"]) == ("encoder", "embed", 30)
    status, page = server.ask("/")
    assert status == 200
    assert "://" not in page


def test_what_is_no_http_is_answered_in_json(server: Served) -> None:
    with server.connect() as connection:
        connection.sendall(b"hello there\r\n\r\n")
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_http"
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000)
        assert received(connection).startswith((b"HTTP/1.1 400", b""))
    assert server.ask("/health")[0] == 200


def test_slow_senders_are_let_go(server: Served) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as silent, server.connect() as half_a_head, server.connect() as half_a_body:
        half_a_head.sendall(head)
        half_a_body.sendall(head + b'Content-Length: 100\r\n\r\n{"input":')
        assert received(silent) == b""
        assert received(half_a_head) == b""
        answer = received(half_a_body)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"receive_timeout" in answer
    with server.connect() as later:  # the second request of a connection
        later.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert later.recv(65536).startswith(b"HTTP/1.1 200")
        later.sendall(head)
        assert b"HTTP/1.1 200" not in received(later)


def test_a_body_that_announces_too_much_is_refused_at_once(server: Served) -> None:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as connection:
        connection.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
        assert received(connection).startswith(b"HTTP/1.1 413")


def drop_connections(server: Served, count: int) -> None:
    """Open connections and drop them: silent, in the middle of a head or of a body, and behind a whole request."""
    body = json.dumps({"input": people.TEXTS}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    whole = head + str(len(body)).encode() + b"\r\n\r\n" + body
    for i in range(count):
        with server.connect() as connection:
            connection.sendall((b"", whole[:40], whole[:-20], whole)[i % 4])


def check_quiet(server: Served) -> None:
    """Wait until the server has nothing left to do, and look whether it still answers."""
    wait_until(lambda: server.figure("nogemm_active_requests") == 1, "all requests have ended")  # this one
    wait_until(lambda: server.figure("nogemm_waiting_texts") == 0, "no text waits")
    assert server.ask(EMBED, {"input": "a"})[0] == 200
    assert server.figure("nogemm_worker_restarts_total") == 0
    assert server.process.poll() is None


def test_connections_that_are_dropped_leave_nothing_behind(server: Served) -> None:
    stop = threading.Event()
    found: list[int] = []

    def others() -> None:
        while not stop.is_set():
            found.append(server.ask(EMBED, {"input": "the text"})[0])

    thread = threading.Thread(target=others)
    thread.start()
    try:
        drop_connections(server, 300)
    finally:
        stop.set()
        thread.join()
    assert set(found) == {200}
    check_quiet(server)


@pytest.mark.slow
def test_ten_thousand_dropped_connections(server: Served) -> None:
    drop_connections(server, 10_000)
    check_quiet(server)
