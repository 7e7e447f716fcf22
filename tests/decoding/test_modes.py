"""The modes of a head in nogemm.generate: what is deferred is the dense model's text, what is fast is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import decoders
import nogemm
from nogemm import ConfigError, GenerationReport, HeadConfig
from nogemm.testing.compare import Mismatch, check_equal

POOR: dict[str, Any] = {"leading": 4, "sketch": 4, "rows": 1}  # a search that is often wrong
SAMPLED: dict[str, Any] = {"do_sample": True, "seed": 5, "temperature": 1.5}


def pair(kind: str, **choices: Any) -> tuple[Any, Any]:
    """Return the same model with an exact head, and with another."""
    models = decoders.make(kind), decoders.make(kind)
    for model, config in zip(models, (HeadConfig(), HeadConfig(**choices)), strict=True):
        nogemm.convert_head(model, config, [{"input_ids": decoders.prompts(4, 12)}])
    return models


@pytest.mark.parametrize("how", [{}, SAMPLED, {**SAMPLED, "top_p": 0.8}, {**SAMPLED, "top_k": 3}], ids=str)
@pytest.mark.parametrize("kind", decoders.DECODERS)
def test_deferred_tokens_are_the_exact_ones(kind: str, how: dict[str, Any]) -> None:
    exact, deferred = pair(kind, mode="deferred", verify_every=5, **POOR)
    ids, report = decoders.prompts(2), GenerationReport()
    expected = nogemm.generate(exact, ids, 33, **how)
    check_equal("tokens", nogemm.generate(deferred, ids, 33, report=report, **how), expected)
    assert report.tokens == 66
    assert report.differences > 0
    assert report.proofs >= 33 / 5
    guessing = pair(kind, mode="fast", **POOR)[1]
    with pytest.raises(Mismatch):
        check_equal("without a proof", nogemm.generate(guessing, ids, 33, **how), expected)


@pytest.mark.parametrize("every", [1, 4, 100])
def test_any_window_and_a_good_search(every: int) -> None:
    exact, deferred = pair("gemma3 sliding", mode="deferred", verify_every=every)
    ids, report = decoders.prompts(1, 20), GenerationReport()
    expected = nogemm.generate(exact, ids, 30)
    check_equal("tokens", nogemm.generate(deferred, ids, 30, report=report), expected)
    assert report.differences == 0
    assert report.proofs == -(-30 // min(every, 7))  # a window of eight positions forgets what is longer ago


@pytest.mark.parametrize("how", [{}, {**SAMPLED, "top_k": 3}], ids=str)
def test_many_sequences_are_proven_at_once(how: dict[str, Any]) -> None:
    exact, deferred = pair("llama", mode="deferred", verify_every=5, **POOR)
    ids, report = decoders.prompts(3), GenerationReport()
    got = nogemm.generate(deferred, ids, 12, report=report, **how)
    check_equal("tokens", got, nogemm.generate(exact, ids, 12, **how))
    assert (report.tokens, report.proofs, report.differences) == (36, 0, 0)


def test_padding_ends_and_threads_between_tokens() -> None:
    exact, deferred = pair("llama", mode="deferred", verify_every=4, **POOR)
    both = torch.cat(
        (torch.cat((torch.zeros(1, 4, dtype=torch.int64), decoders.prompts(1, 3)), 1), decoders.prompts(1, 7))
    )
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    whole = nogemm.generate(exact, both, 24, attention_mask=mask)
    end = int(whole[1, 15])

    def other_threads(token: torch.Tensor) -> None:
        torch.set_num_threads(1 + int(token[0]) % 2)

    for ends in ([], [end]):
        expected = nogemm.generate(exact, both, 24, attention_mask=mask, eos_token_id=ends, pad_token_id=2)
        got = nogemm.generate(
            deferred, both, 24, attention_mask=mask, eos_token_id=ends, pad_token_id=2, streamer=other_threads
        )
        check_equal(f"ends {ends}", got, expected)


def test_streams_and_what_is_in_vain() -> None:
    exact, deferred = pair("llama", mode="deferred", verify_every=4, **POOR)
    ids, kept, drafts = decoders.prompts(), [], []
    got = nogemm.generate(deferred, ids, 20, streamer=kept.append, draft_streamer=drafts.append)
    check_equal("kept", torch.stack(kept, 1), got[:, 5:])
    check_equal("exact", got, nogemm.generate(exact, ids, 20))
    assert len(drafts) > len(kept) == 20


@pytest.mark.parametrize("kind", ["llama", "gemma3 sliding"])
@pytest.mark.parametrize("mode", ["exact", "deferred"])
@pytest.mark.parametrize("place", ["stream", "model"])
def test_it_goes_on_after_an_interruption(kind: str, mode: str, place: str) -> None:
    exact, model = pair(kind, mode=mode, verify_every=6, **POOR)
    ids = decoders.prompts()
    whole = nogemm.generate(exact, ids, 30)
    cache, seen, calls = tf.DynamicCache(config=model.config), [], []

    def stream(token: torch.Tensor) -> None:
        seen.append(token)
        if place == "stream" and len(seen) == 8:
            raise KeyboardInterrupt

    def stop(*_: Any) -> None:
        calls.append(1)
        if place == "model" and len(calls) == 30:
            raise KeyboardInterrupt

    nogemm.generate(model, ids, 2)  # the proof of the model has runs of its own
    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)  # the cache has taken the token in part
    with pytest.raises(KeyboardInterrupt):
        nogemm.generate(model, ids, 30, cache=cache, streamer=stream)
    handle.remove()
    so_far = torch.cat((ids, torch.stack(seen, 1)), 1)
    assert cache.get_seq_length() == so_far.shape[1] - 1
    check_equal("so far", so_far, whole[:, : so_far.shape[1]])
    check_equal("the rest", nogemm.generate(model, so_far, 35 - so_far.shape[1], cache=cache), whole)


def test_a_cache_that_cannot_go_back_is_refused() -> None:
    model = pair("llama", mode="deferred")[1]
    cache = tf.StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ConfigError, match="'deferred' needs a cache that can go back"):
        nogemm.generate(model, decoders.prompts(), 4, cache=cache)


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)


@pytest.mark.parametrize("mode", ["exact", "deferred"])
def test_a_string_ends_a_text(mode: str) -> None:
    exact, model = pair("llama", mode=mode, verify_every=7)
    ids = decoders.prompts(2)
    whole = nogemm.generate(exact, ids, 30)
    text = Letters().decode(whole[0, 5:].tolist())
    stop = text[9:12]
    length = text.index(stop) + 3
    cache = tf.DynamicCache(config=model.config)
    got = nogemm.generate(
        model, ids[:1], 30, stop_strings=["never", stop], tokenizer=Letters(), eos_token_id=[], cache=cache
    )
    check_equal("until the string", got, whole[:1, : 5 + length])
    assert cache.get_seq_length() == got.shape[1] - 1
    both = nogemm.generate(model, ids, 30, stop_strings=stop, tokenizer=Letters(), pad_token_id=3)
    check_equal("of a batch", both[0, : 5 + length], whole[0, : 5 + length])
    assert bool((both[0, 5 + length :] == 3).all())


@torch.no_grad()
def test_logits_of_fast_heads_are_exact_in_front_and_estimates_behind() -> None:
    dense = decoders.make("llama")
    model = pair("llama", mode="fast", rows=40, leading=4, sketch=12)[1]
    x = torch.randn(6, 24)
    head, exact = model.lm_head, dense.lm_head(x)
    got = head(x)
    assert bool((got.argmax(1) == exact.argmax(1)).all())
    close = (got - exact).abs() <= 1e-4 * exact.abs().amax()
    assert bool((close.sum(1) >= 40).all())
    assert not bool(close.all())
    off = (got.log_softmax(1) - exact.log_softmax(1)).abs()
    assert float(off.mean()) < 0.1 * float(exact.std())
    assert got.dtype == x.dtype
    many = torch.randn(33, 24)
    assert bool(((head(many) - dense.lm_head(many)).abs() <= 1e-4 * exact.abs().amax()).all())
    check_equal("shape", head(x.view(2, 3, 24)), got.view(2, 3, -1))


def test_a_fast_head_learns_as_a_dense_one() -> None:
    model = pair("llama", mode="fast", **POOR)[1].train()
    dense = decoders.make("llama").train()
    x = torch.randn(3, 24)
    for one in (model, dense):
        one.lm_head(x).logsumexp(1).sum().backward()
    check_equal("gradient", model.lm_head.weight.grad, dense.lm_head.weight.grad)


@pytest.mark.parametrize("kind", ["llama", "gemma2 capped", "phi with a bias"])
@pytest.mark.parametrize("how", [{}, SAMPLED, {**SAMPLED, "top_p": 0.8}], ids=str)
def test_rows_of_high_recall_are_chosen_on_data(kind: str, how: dict[str, Any]) -> None:
    exact, model = pair(kind, mode="high_recall", recall=0.9, leading=4, sketch=4)
    head = model.get_output_embeddings()
    assert 64 <= head.config.rows < decoders.V
    every = pair(kind, mode="high_recall", recall=1.0, leading=4, sketch=4)[1].get_output_embeddings()
    assert every.config.rows >= head.config.rows
    ids, report = decoders.prompts(3, 12), GenerationReport()
    got, expected = nogemm.generate(model, ids, 12, report=report, **how), nogemm.generate(exact, ids, 12, **how)
    assert float((got[:, 12] == expected[:, 12]).double().mean()) >= 0.6
    assert report.proofs == report.dense == 0
    assert set(report.rows) == {head.config.rows}


def test_choices_that_cannot_be_are_named() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("mode must be one of .*, got .*'quick'", {"mode": "quick"}),
        ("verify_every must be an integer at least 1", {"verify_every": 0}),
        ("recall must be above 0 and at most 1, got 0", {"recall": 0}),
        ("rows must be an integer at least 1", {"rows": 0}),
    ]
    for words, choices in cases:
        with pytest.raises(ConfigError, match=words):
            HeadConfig(**choices)
    with pytest.raises(ConfigError, match="mode 'high_recall' needs data"):
        nogemm.convert_head(decoders.make("llama"), HeadConfig(mode="high_recall"))
