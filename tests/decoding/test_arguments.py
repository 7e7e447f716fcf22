"""Arguments of generate that cannot be, in the caller's words; streamers of transformers."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers as tf

import decoders
import nogemm
from nogemm import ConfigError, HeadConfig
from nogemm.testing.compare import Mismatch, check_equal


@pytest.fixture(scope="module")
def model() -> Any:
    made = decoders.make("llama")
    nogemm.convert_head(made)
    return made


class Words:
    """A tokenizer of one word a token."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"<{int(token)}> " for token in ids)


class Recorded:
    """A streamer in the manner of transformers."""

    def __init__(self) -> None:
        self.given: list[torch.Tensor] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.clone())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("mode", ["exact", "deferred"])
def test_a_streamer_gets_what_transformers_gives_it(mode: str) -> None:
    model, ids = decoders.make("llama"), decoders.prompts(2)
    theirs, ours = Recorded(), Recorded()
    model.generate(ids, max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(ids), streamer=theirs)
    nogemm.convert_head(model, HeadConfig(mode=mode))  # type: ignore[arg-type]
    got = nogemm.generate(model, ids, 9, streamer=ours)
    assert len(ours.given) == len(theirs.given) == 10
    for one, other in zip(ours.given, theirs.given, strict=True):
        check_equal("a step", one, other)
    assert ours.ends == theirs.ends == 1
    check_equal("all of it", torch.cat((ours.given[0], torch.stack(ours.given[1:], 1)), 1), got)
    with pytest.raises(Mismatch):
        check_equal("another step", ours.given[1], theirs.given[0])


def test_text_streamers(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ids = decoders.prompts()
    tokens = nogemm.generate(model, ids, 6)[0].tolist()
    words: Any = Words()
    nogemm.generate(model, ids, 6, streamer=tf.TextStreamer(words))
    assert capsys.readouterr().out == words.decode(tokens) + "\n"
    nogemm.generate(model, ids, 6, streamer=tf.TextStreamer(words, skip_prompt=True))
    assert capsys.readouterr().out == words.decode(tokens[5:]) + "\n"
    stream = tf.TextIteratorStreamer(words, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=nogemm.generate, args=(model, ids, 6), kwargs={"streamer": stream})
    thread.start()
    assert "".join(stream) == words.decode(tokens[5:])
    thread.join()


def test_a_stream_ends_behind_an_error_and_without_tokens(model: Any) -> None:
    ids, stream = decoders.prompts(), Recorded()

    def broken(ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        nogemm.generate(model, ids, 4, streamer=stream, logits_processor=[broken])
    assert (len(stream.given), stream.ends) == (1, 1)
    nogemm.generate(model, ids, 0, streamer=stream)
    assert (len(stream.given), stream.ends) == (2, 2)


def test_end_tokens_may_be_a_tensor(model: Any) -> None:
    ids = decoders.prompts()
    whole = nogemm.generate(model, ids, 12)
    ends = [int(whole[0, 8]), 3]
    expected = nogemm.generate(model, ids, 12, eos_token_id=ends)
    assert expected.shape[1] <= 9
    check_equal("several", nogemm.generate(model, ids, 12, eos_token_id=torch.tensor(ends)), expected)
    one = nogemm.generate(model, ids, 12, eos_token_id=ends[0])
    check_equal("one", nogemm.generate(model, ids, 12, eos_token_id=torch.tensor(ends[0])), one)


def test_masks_of_other_kinds_are_the_same_mask(model: Any) -> None:
    ids = decoders.prompts(2)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = nogemm.generate(model, ids, 6, attention_mask=mask)
    for dtype in (torch.bool, torch.float32, torch.int32):
        check_equal(str(dtype), nogemm.generate(model, ids, 6, attention_mask=mask.to(dtype)), expected)
    with pytest.raises(Mismatch):
        check_equal("no mask", nogemm.generate(model, ids, 6), expected)


def test_a_pad_that_the_config_names_and_the_model_has_not_is_the_end(model: Any) -> None:
    ids = decoders.prompts(2)
    end = int(nogemm.generate(model, ids, 12)[0, 6])
    expected = nogemm.generate(model, ids, 12, eos_token_id=end, pad_token_id=end)
    model.generation_config.pad_token_id = -1
    check_equal("tokens", nogemm.generate(model, ids, 12, eos_token_id=end), expected)
    model.generation_config.pad_token_id = None


def test_bad_arguments_are_named(model: Any) -> None:
    ids = decoders.prompts()
    sample = {"do_sample": True}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("attention_mask must be a tensor like input_ids, got list", {"attention_mask": [[1] * 5]}),
        ("eos_token_id must be a token or several, got 1.5", {"eos_token_id": 1.5}),
        ("eos_token_id must be a token or several, got tensor", {"eos_token_id": torch.tensor([1.5])}),
        ("eos_token_id must be a token or several, got ''", {"eos_token_id": ""}),
        (r"eos_token_id must be tokens from 0 to 306, got 307; \[\] never ends", {"eos_token_id": [2, 307]}),
        ("eos_token_id must be tokens from 0 to 306, got -1", {"eos_token_id": -1}),
        ("eos_token_id must be a token or several, got True", {"eos_token_id": True}),
        ("pad_token_id must be a token from 0 to 306, got 'x'", {"pad_token_id": "x"}),
        ("pad_token_id must be a token from 0 to 306, got 307", {"pad_token_id": 307}),
        ("pad_token_id must be a token from 0 to 306, got -1", {"pad_token_id": -1}),
        ("temperature must be a finite number above 0, got 'hot'", {**sample, "temperature": "hot"}),
        ("temperature must be a finite number above 0, got nan", {**sample, "temperature": float("nan")}),
        ("top_p must be above 0 and at most 1, got '0.9'", {**sample, "top_p": "0.9"}),
        ("top_k must be an integer at least 0, got top_k='5'", {**sample, "top_k": "5"}),
        ("temperature=0.5 needs do_sample=True", {"temperature": 0.5}),
        ("top_k=5 needs do_sample=True", {"top_k": 5}),
        ("top_p=0.9 needs do_sample=True", {"top_p": 0.9}),
        ("seed=1 needs do_sample=True", {"seed": 1}),
        ("stop_strings must be texts that are not empty, got 5", {"stop_strings": 5, "tokenizer": Words()}),
        ("streamer must be a function of tokens, or have put and end, got str", {"streamer": "x"}),
        ("draft_streamer must be a function of tokens, got Recorded", {"draft_streamer": Recorded()}),
    ]
    for words, more in cases:
        with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
            nogemm.generate(model, ids, 2, **more)
    nogemm.generate(model, ids, 2, temperature=1.0)  # what greedy tokens have anyway
