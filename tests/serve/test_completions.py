"""A served decoder: the tokens of `nogemm.generate`, whole and as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import nogemm
import people
from nogemm.models.loading import load_model
from served import Served, events, wait_until

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' }}{{ m.content }} {% endfor %}the"
)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = people.gpt2(tmp_path_factory.mktemp("serve") / "gpt2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(decoder: Path) -> Iterator[Served]:
    found = Served(decoder, "--limit", "new_tokens=30", "--name", "small")
    yield found
    found.stop()


@pytest.fixture(scope="module")
def reference(decoder: Path) -> Any:
    model, tokenizer = load_model(decoder), AutoTokenizer.from_pretrained(decoder)
    nogemm.convert_head(model)

    def continued(prompt: str, count: int, **more: Any) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        return tokenizer.decode(nogemm.generate(model, ids, count, **more)[0])[len(tokenizer.decode(ids[0])) :]

    return continued


def test_completions_are_those_of_generate(server: Served, reference: Any) -> None:
    prompts = ["a fast", "the slow table", "of of of"]
    status, found = server.ask(TEXT, {"prompt": prompts, "max_tokens": 9, "model": "small", "n": 1, "top_p": 1})
    assert status == 200
    assert [choice["text"] for choice in found["choices"]] == [reference(prompt, 9) for prompt in prompts]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert {choice["finish_reason"] for choice in found["choices"]} == {"length"}
    assert found["usage"] == {"prompt_tokens": 8, "completion_tokens": 27, "total_tokens": 35}
    assert reference("a fast", 9) != reference("the slow table", 9)


def test_a_stream_is_the_same_text(server: Served, reference: Any) -> None:
    body = {"prompt": "the slow", "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
    status, text = server.ask(TEXT, body)
    *chunks, last, usage, done = events(text)
    assert (status, done) == (200, "[DONE]")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == reference("the slow", 9)
    assert len(chunks) > 3
    assert last["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 9)
    assert len({chunk["id"] for chunk in [*chunks, last, usage]}) == 1


def test_samples_follow_their_seed(server: Served, reference: Any) -> None:
    body = {"prompt": "a", "max_tokens": 12, "temperature": 1.5, "top_p": 0.9, "seed": 7}
    wanted = reference("a", 12, do_sample=True, temperature=1.5, top_p=0.9, seed=7)
    assert [server.ask(TEXT, body)[1]["choices"][0]["text"] for _ in range(2)] == [wanted, wanted]
    assert server.ask(TEXT, body | {"seed": 8})[1]["choices"][0]["text"] != wanted


def test_a_stop_string_ends_a_text(server: Served, reference: Any) -> None:
    whole = reference("a fast", 12)
    stop = whole.split()[2]
    for stream in (False, True):
        status, found = server.ask(TEXT, {"prompt": "a fast", "max_tokens": 12, "stop": [stop], "stream": stream})
        assert status == 200
        choices = [event["choices"][0] for event in events(found)[:-1]] if stream else found["choices"]
        assert "".join(choice["text"] for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1]["finish_reason"] == "stop"


def test_a_chat_goes_through_the_template(server: Served, reference: Any) -> None:
    body = {"messages": [{"role": "user", "content": "a fast"}], "max_completion_tokens": 6}
    status, found = server.ask(CHAT, body)
    assert status == 200
    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": reference("a fast the", 6)}
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "fast"}]
    text = server.ask(CHAT, {"messages": [{"role": "user", "content": parts}], "max_tokens": 6, "stream": True})[1]
    first, *chunks, _, done = events(text)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == choice["message"]["content"]
    assert done == "[DONE]"
    status, found = server.ask(CHAT, {"messages": [{"role": "system", "content": "a"}]})
    assert status == 400
    assert "no system" in found["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": ""}, "prompt has no token."),
        ({"prompt": "a " * 50}, "prompt has 50 tokens, and the model has 40 positions."),
        ({"prompt": "a", "max_tokens": 31}, "max_tokens is 31, and 30 are allowed."),
        ({"prompt": "a " * 20, "max_tokens": 21}, "behind 20 of prompt the model has room for 20."),
        ({"prompt": "a", "n": 2}, "n is not offered here; leave it out."),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty is not offered here; leave it out."),
        ({"prompt": "a", "temperature": -1}, "temperature must be a number from 0 to 2."),
        ({"prompt": "a", "top_p": 0}, "top_p must be above 0."),
        ({"prompt": "a", "stop": [""]}, "stop must be a text or a list of texts that are not empty."),
        ({"prompt": "a", "stop": list("abcde")}, "stop has 5 texts, and 4 are allowed."),
        ({"prompt": ["a", "b"], "stream": True}, "A stream is of one prompt."),
        ({"prompt": "a", "messages": []}, "'messages' is no field of this request."),
        ({"prompt": "a", "max_tokens": True}, "max_tokens must be a whole number of at least 1."),
    ],
)
def test_what_cannot_be_done_is_refused(server: Served, body: dict[str, Any], said: str) -> None:
    status, found = server.ask(TEXT, body)
    assert status == 400
    assert said in found["error"]["message"]


def test_who_hangs_up_frees_the_worker(server: Served) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 30, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for _ in range(20):
        with server.connect() as connection:
            connection.sendall(head + b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
            connection.recv(10)
    wait_until(lambda: server.figure("nogemm_active_requests") == 1, "all streams have ended")
    assert server.ask(TEXT, {"prompt": "a"})[0] == 200
    assert server.figure("nogemm_worker_restarts_total") == 0
