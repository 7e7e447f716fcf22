"""Signals, dying workers, keys and wrong models: nothing is lost, nothing doubled, and everything said."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import people
from nogemm.errors import ConfigError
from nogemm.models.embed import embed
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.serve import ServeOptions, create_app
from served import Served, wait_until

EMBED = "/v1/embeddings"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_server_that_is_stopped_answers_what_it_took(encoder: Path, number: int) -> None:
    with Served(encoder, "--limit", "batch_texts=1") as server:
        stop_under_load(server, number)


def stop_under_load(server: Served, number: int) -> None:
    chance = random.Random(0)
    bodies = [{"input": chance.choices(people.TEXTS, k=200)} for _ in range(8)]
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda body=body: answers.append(server.ask(EMBED, body))) for body in bodies]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.figure("nogemm_active_requests") == 1 + len(bodies) - len(answers), "all were taken")
    workers = server.workers()
    code = server.stop(number)
    for thread in threads:
        thread.join()
    assert [status for status, _ in answers] == [200] * len(bodies)
    assert [len(found["data"]) for _, found in answers] == [200] * len(bodies)
    assert code == 128 + number
    assert "stopped by" in server.lines[-1]
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", server.port)):
        pass
    assert not any(worker.is_running() for worker in workers)


def test_workers_that_are_killed_under_load_lose_nothing(encoder: Path) -> None:
    with Served(encoder, "--workers", 2, "--limit", "batch_texts=4") as server:
        kill_under_load(server, encoder)


def kill_under_load(server: Served, encoder: Path) -> None:
    chance = random.Random(0)
    bodies = [{"input": chance.choices(people.TEXTS, k=3)} for _ in range(300)]
    done = threading.Event()
    killed: list[int] = []

    def restarted() -> bool:
        count = server.figure("nogemm_worker_restarts_total")
        return count == len(killed) and server.ask("/health")[1]["ready"] == 2

    def kill() -> None:
        for _ in range(2):
            wait_until(lambda: done.is_set() or restarted(), "both workers are there")
            if not done.is_set():
                victim = chance.choice(server.workers())
                victim.kill()
                killed.append(victim.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = server.together(EMBED, bodies, at_once=8)
    finally:
        done.set()
        killer.join()
    model, tokenizer = load_encoder(encoder), load_tokenizer(encoder)
    wanted = {text: embed(model, tokenizer, [text])[0] for text in people.TEXTS}
    errors = 0
    for body, (status, answer) in zip(bodies, found, strict=True):
        if status == 200:
            vectors = np.array([row["embedding"] for row in answer["data"]])
            assert np.abs(vectors - np.array([wanted[text] for text in body["input"]])).max() < 1e-5
        else:  # twice in a batch whose worker was killed
            assert (status, answer["error"]["code"]) == (500, "worker_died")
            errors += 1
    assert killed
    assert errors <= 4 * len(killed)
    wait_until(restarted, "both workers are there again")
    assert server.ask(EMBED, bodies[0])[0] == 200
    workers = server.workers()
    assert len(workers) == 2
    server.process.kill()  # workers end with their server, whatever ended it
    server.ended()
    wait_until(lambda: not any(one.is_running() and one.status() != "zombie" for one in workers), "its workers end")


def test_workers_map_one_copy_of_what_is_packed(encoder: Path, tmp_path: Path) -> None:
    assert people.run("convert", encoder, tmp_path / "converted", *people.SAME) == 0
    with Served(tmp_path / "converted", "--workers", 2, NOGEMM_CACHE=str(tmp_path / "cache")) as server:
        (file,) = (tmp_path / "cache" / "packed").iterdir()
        assert [str(file) in {one.path for one in worker.memory_maps()} for worker in server.workers()] == [True, True]
        assert server.ask(EMBED, {"input": "a text"})[0] == 200


def asked(app: Any, path: str, method: str = "GET", **headers: str) -> int:
    """Ask an application that has not been started; return the status."""
    found: list[int] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        found.append(message.get("status", 0))

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
             "scheme": "http", "server": ("127.0.0.1", 80), "http_version": "1.1", "root_path": ""}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return found[0]


def test_a_key_is_asked_for(encoder: Path) -> None:
    key = "0123456789abcdef"
    app = create_app(ServeOptions(model=str(encoder), host="0.0.0.0", api_key=key))
    paths = ("/metrics", "/nothing", EMBED)
    assert [asked(app, path) for path in paths] == [401] * 3
    wrong = ("Bearer " + key[:-1], "Bearer " + key + "0", key, "Bearer", "Basic " + key, "bearer\xff")
    assert [asked(app, "/metrics", authorization=value) for value in wrong] == [401] * len(wrong)
    assert asked(app, "/metrics", authorization="Bearer " + key) == 200
    assert asked(app, "/nothing", authorization="Bearer " + key) == 404
    assert asked(app, "/") == 200
    assert asked(app, EMBED, "POST", authorization="Bearer " + key) == 415


def test_without_a_key_a_server_answers_to_names_of_this_machine(encoder: Path) -> None:
    app = create_app(ServeOptions(model=str(encoder)))
    for host, status in (
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:9", 200),
        ("evil.example", 403),
        ("", 403),
    ):
        assert asked(app, "/metrics", host=host) == status


def test_more_requests_than_are_allowed_are_refused(encoder: Path) -> None:
    app = create_app(ServeOptions(model=str(encoder), requests=2))
    assert asked(app, "/metrics", host="localhost") == 200
    app.service.active = 2
    assert asked(app, "/metrics", host="localhost") == 503
    assert app.service.active == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"host": "0.0.0.0"}, "there is no API key"),
        ({"host": "example.org"}, "there is no API key"),
        ({"host": "0.0.0.0", "api_key": "short"}, "at least 16 characters"),
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
        ({"request_seconds": float("nan")}, "request_seconds must be above 0"),
        ({"port": 70000}, "port must be from 0 to 65535"),
        ({"task": "rank"}, "task must be one of auto, embed, rerank, generate, got 'rank'"),
        ({"dtype": "int4"}, "dtype must be one of fp32, bf16, int8"),
    ],
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ServeOptions(model="m", **given)


def test_wrong_models_end_the_command(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: object) -> str:
        assert people.run("serve", *words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "config.json is missing" in said(tmp_path)
    assert "is a model to embed" in said(encoder, "--task", "rerank")
    assert "there is no API key" in said(encoder, "--host", "0.0.0.0")
    assert "a server has no such limit; it has: body_bytes" in said(encoder, "--limit", "texts=1")
    assert "body_bytes must be a whole number" in said(encoder, "--limit", "body_bytes=0")
    (tmp_path / "key").write_text("\n")
    assert "the first line is empty" in said(encoder, "--api-key-file", tmp_path / "key")
    broken = people.bert(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    assert "nogemm: " in said(broken, "--port", 0)
    people.edit(people.bert(tmp_path / "own") / "config.json", auto_map={"AutoConfig": "own.C"}, model_type="own")
    assert "runs code of its own directory, which a server does not" in said(tmp_path / "own", "--port", 0)
    (tmp_path / "nogemm_export.json").write_text("{}")
    assert "--dtype does not go with an export" in said(tmp_path, "--dtype", "fp32")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen on 127.0.0.1" in said(encoder, "--port", taken.getsockname()[1])
