"""nogemm.generate: the dense model's tokens, for every kind of head; seeds, caches, ends and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers as tf

import decoders
import nogemm
from nogemm import ConfigError, GenerationReport, HeadConfig, NotFiniteError
from nogemm.decoding.sampling import Sampling, gumbel
from nogemm.testing.compare import Mismatch, check_equal


def dense_greedy(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Decode without a cache: the largest of all logits, step by step."""
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1].argmax(1, keepdim=True)), 1)
    return ids


def converted(kind: str, **choices: Any) -> Any:
    model = decoders.make(kind)
    nogemm.convert_head(model, HeadConfig(**choices), [{"input_ids": decoders.prompts(4, 12)}])
    return model


@pytest.mark.parametrize("kind", decoders.DECODERS)
@torch.no_grad()
def test_greedy_tokens_are_the_dense_models(kind: str) -> None:
    model, ids = decoders.make(kind), decoders.prompts(3)
    expected = dense_greedy(model, ids, 24)
    theirs = model.generate(ids, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(ids))
    nogemm.convert_head(model, HeadConfig(leading=8))
    report = GenerationReport()
    check_equal("tokens", nogemm.generate(model, ids, 24, report=report), expected)
    check_equal("transformers' own", theirs, expected)
    dense = decoders.make(kind)
    for how in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}, {"do_sample": True, "top_k": 5}):
        outputs = []
        for one in (dense, model):
            torch.manual_seed(1)
            outputs.append(one.generate(ids, max_new_tokens=6, attention_mask=torch.ones_like(ids), **how))
        check_equal(f"generate of transformers {how}", *outputs)
    assert report.tokens == 3 * 24
    assert len(report.rows) == 3 * 24
    assert max(report.rows) < decoders.V
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % decoders.V
    with pytest.raises(Mismatch):
        check_equal("another prompt", nogemm.generate(model, other, 24)[:, 5:], expected[:, 5:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_tokens_of_half_precision_are_those_of_logits_accumulated_in_float32(dtype: torch.dtype) -> None:
    model = converted("llama tied").to(dtype)
    ids = decoders.prompts(2)
    got = nogemm.generate(model, ids, 12)
    states = model.base_model(got[:, :-1]).last_hidden_state[:, 4:]
    logits = states.double() @ model.lm_head.weight.double().T
    chosen = logits.gather(2, got[:, 5:].unsqueeze(2))
    # The states without a cache differ by their own rounding.
    assert bool((logits.amax(2, keepdim=True) - chosen <= 2e-2 * logits.abs().amax()).all())


def test_padding_on_the_left_changes_nothing() -> None:
    model = converted("llama")
    short, long = decoders.prompts(1, 3), decoders.prompts(1, 7)
    both = torch.cat((torch.cat((torch.zeros(1, 4, dtype=torch.int64), short), 1), long))
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    got = nogemm.generate(model, both, 12, attention_mask=mask)
    check_equal("short", got[:1, 4:], nogemm.generate(model, short, 12))
    check_equal("long", got[1:], nogemm.generate(model, long, 12))


def test_it_goes_on_from_a_cache_and_after_an_interruption() -> None:
    model, ids = converted("llama"), decoders.prompts()
    whole = nogemm.generate(model, ids, 20)
    cache = tf.DynamicCache(config=model.config)
    half = nogemm.generate(model, ids, 9, cache=cache)
    check_equal("half", half, whole[:, :14])
    check_equal("the rest", nogemm.generate(model, half, 11, cache=cache), whole)

    class Stop(Exception):
        pass

    seen: list[torch.Tensor] = []

    def stream(token: torch.Tensor) -> None:
        seen.append(token)
        if len(seen) == 6:
            raise Stop

    cache = tf.DynamicCache(config=model.config)
    with pytest.raises(Stop):
        nogemm.generate(model, ids, 20, cache=cache, streamer=stream)
    so_far = torch.cat((ids, torch.stack(seen, 1)), 1)
    check_equal("after an interruption", nogemm.generate(model, so_far, 14, cache=cache), whole)


def test_an_end_token_ends_a_sequence_and_pads_the_rest() -> None:
    model, ids = converted("llama"), decoders.prompts(2)
    whole = nogemm.generate(model, ids, 12)
    end = int(whole[0, 8])
    got = nogemm.generate(model, ids, 12, eos_token_id=end, pad_token_id=1)
    stop = int((whole[0, 5:] == end).int().argmax()) + 5
    check_equal("until the end", got[0, : stop + 1], whole[0, : stop + 1])
    assert bool((got[0, stop + 1 :] == 1).all())
    assert int((got[1] == end).sum()) <= 1
    check_equal("never", nogemm.generate(model, ids, 12, eos_token_id=[]), whole)
    check_equal("no new token", nogemm.generate(model, ids, 0), ids)


def test_samples_follow_the_seed_and_the_distribution() -> None:
    model, ids = converted("llama"), decoders.prompts(2)
    sample = {"do_sample": True, "top_p": 0.9, "temperature": 2.0}
    one = nogemm.generate(model, ids, 10, seed=3, **sample)
    check_equal("the same seed", nogemm.generate(model, ids, 10, seed=3, **sample), one)
    assert not torch.equal(nogemm.generate(model, ids, 10, seed=4, **sample), one)
    alone = nogemm.generate(model, ids[:1], 10, seed=3, **sample)
    check_equal("another batch", alone, one[:1])
    check_equal(
        "top_k 1 is greedy", nogemm.generate(model, ids, 10, do_sample=True, top_k=1), nogemm.generate(model, ids, 10)
    )
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -50.0]])
    rule = Sampling(1.0, None, None, 0)
    counts = torch.bincount(torch.cat([rule.draw(logits, [step], [0]) for step in range(4000)]), minlength=5) / 4000
    assert float((counts - logits.softmax(1)[0]).abs().max()) < 0.03
    assert float(counts[4]) == 0
    noise = gumbel(100_001, -1, 2, 3).double()
    assert bool(noise.isfinite().all())
    assert abs(float(noise.mean()) - 0.5772) < 0.02
    for quantile in (0.01, 0.5, 0.99, 0.9999):  # of Gumbel's distribution, exp(-exp(-g))
        below = float((noise <= -math.log(-math.log(quantile))).double().mean())
        assert abs(below - quantile) < 5 * math.sqrt(quantile * (1 - quantile) / len(noise))
    assert abs(float(torch.corrcoef(torch.stack((noise, gumbel(100_001, -1, 3, 3).double())))[0, 1])) < 0.02


def test_top_k_and_top_p_leave_what_they_should() -> None:
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.15, 0.05]]).log()
    left = lambda **how: Sampling(1.0, how.get("k"), how.get("p"), 0).allowed(scores).isfinite()[0].tolist()  # noqa: E731
    assert left(k=2) == [True, False, True, False, False]
    assert left(p=0.39) == [True, False, False, False, False]
    assert left(p=0.41) == [True, False, True, False, False]
    assert left(p=0.71) == [True, False, True, True, False]
    assert left() == [True] * 5
    assert left(k=9, p=1.0) == left(k=0) == [True] * 5


def test_a_broken_state_gives_no_token() -> None:
    model, ids = converted("llama"), decoders.prompts(2)
    nogemm.generate(model, ids, 2)
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(NotFiniteError, match="the state of sequence 0 before token 5 is not finite"):
        nogemm.generate(model, ids, 4)
    fresh = converted("llama")
    with torch.no_grad():
        fresh.model.norm.weight[3] = torch.inf
    with pytest.raises(NotFiniteError, match="the states of LlamaForCausalLM for the tokens"):
        nogemm.generate(fresh, ids, 4)
    states = torch.randn(4, 24)
    states[2, 5] = torch.inf
    with pytest.raises(NotFiniteError, match="the state at position 2 is not finite"):
        model.lm_head.choose(states)
    with pytest.raises(NotFiniteError, match="the logits of sequence 0 are not finite"):
        Sampling(1.0, None, None, 0).draw(torch.tensor([[torch.nan, 1.0]]), [0], [0])


@pytest.mark.parametrize("kind", ["gemma2 capped", "granite scaled", "llama"])
def test_samples_are_drawn_from_the_logits_as_the_model_scales_and_caps_them(kind: str) -> None:
    model, ids = converted(kind), decoders.prompts()
    with torch.no_grad():
        model.lm_head.weight.data = model.lm_head.weight.data * 3
        shares = model(ids).logits[0, -1].float().softmax(0)
    drawn = [int(nogemm.generate(model, ids, 1, do_sample=True, seed=seed)[0, -1]) for seed in range(600)]
    counts = torch.bincount(torch.tensor(drawn), minlength=decoders.V) / len(drawn)
    top = shares.topk(8).indices
    assert float((counts[top] - shares[top]).abs().max()) < 0.08


def test_sampling_goes_on_from_a_cache_as_one_call_would() -> None:
    model, ids = converted("llama"), decoders.prompts()
    sample = {"do_sample": True, "seed": 1}
    whole = nogemm.generate(model, ids, 8, **sample)
    cache = tf.DynamicCache(config=model.config)
    half = nogemm.generate(model, ids, 4, cache=cache, **sample)
    check_equal("both calls", nogemm.generate(model, half, 4, cache=cache, **sample), whole)


def test_a_cache_that_does_not_fit_is_named() -> None:
    model, ids = converted("llama"), decoders.prompts(2)
    cache = tf.DynamicCache(config=model.config)
    nogemm.generate(model, ids, 6, cache=cache)
    for given, words, which in (
        (ids, "the cache holds 10 tokens and input_ids 5", cache),
        (decoders.prompts(1, 20), "the cache is of 2 sequences, input_ids of 1", cache),
        (ids, "must be a cache of transformers, got str", "x"),
    ):
        with pytest.raises(ConfigError, match=words):
            nogemm.generate(model, given, 4, cache=which)


@pytest.mark.parametrize("kind", ["openai-gpt", "mamba", "rwkv"])
def test_a_model_without_a_cache_of_keys_and_values_is_refused(kind: str) -> None:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2}
    model = {
        "openai-gpt": lambda: tf.OpenAIGPTLMHeadModel(
            tf.OpenAIGPTConfig(vocab_size=60, n_embd=16, n_layer=2, n_head=2)
        ),
        "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**small)),
        "rwkv": lambda: tf.RwkvForCausalLM(tf.RwkvConfig(**small, attention_hidden_size=16)),
    }[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    nogemm.convert_head(model)
    with pytest.raises(ConfigError, match="a cache of keys and values"):
        nogemm.generate(model, decoders.prompts() % 60)


def test_hooks_on_the_head_are_refused() -> None:
    model = decoders.make("llama")
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="has forward hooks, which would be lost"):
        nogemm.convert_head(model)
    handle.remove()
    head = nogemm.convert_head(model)
    head.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="the head has forward hooks, which would not be called"):
        nogemm.generate(model, decoders.prompts())


@pytest.mark.parametrize("error", [nogemm.DistributedError("rank 1 has ended"), nogemm.NotFiniteError("a state")])
def test_own_errors_of_a_model_stay_what_they_are(error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    model = converted("llama")
    model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(type(error), match=str(error)):
        nogemm.generate(model, decoders.prompts())


def test_a_model_that_does_not_run_is_not_called_one_without_a_cache() -> None:
    model = converted("llama")
    model.model.layers[0].register_forward_hook(lambda *_: [][2])
    with pytest.raises(ConfigError, match="LlamaForCausalLM does not run on three tokens of the prompt: list index"):
        nogemm.generate(model, decoders.prompts())


def test_ranks_are_told_of_the_whole_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each rank has to be given alike: `ShardedHead.same_call` compares it."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(nogemm.heads.HireHead, "same_call", lambda self, **parts: calls.append(parts))
    model, ids = converted("llama"), decoders.prompts()
    for seed in (1, 2):
        nogemm.generate(model, ids, 2, do_sample=True, seed=seed, temperature=0.5)
    nogemm.generate(model, ids, 2)
    assert [call["sampling"] for call in calls[:2]] == [
        {"temperature": 0.5, "top_k": None, "top_p": None, "seed": seed} for seed in (1, 2)
    ]
    assert calls[2] == {"prompt": ids, "max_new_tokens": 2, "sampling": None}


def test_bad_input_is_named() -> None:
    dense, model, ids = decoders.make("llama"), converted("llama"), decoders.prompts()
    cases: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = [
        ("the model's head is dense; call nogemm.convert_head", dense, (ids,), {}),
        ("the prompt is empty", model, (ids[:, :0],), {}),
        (r"input_ids must be int64 or int32 \[B, L\], got torch.float32 \(1, 5\)", model, (ids.float(),), {}),
        ("input_ids holds no sequence", model, (ids[:0],), {}),
        (
            "temperature must be a finite number above 0, got inf",
            model,
            (ids,),
            {"do_sample": True, "temperature": math.inf},
        ),
        (r"input_ids must be from 0 to 306, got .* to 307", model, (torch.tensor([[1, 307]]),), {}),
        ("max_new_tokens must be an integer of at least 0, got -1", model, (ids, -1), {}),
        ("5 tokens and max_new_tokens=60 are more than the model's 64 positions", model, (ids, 60), {}),
        ("temperature must be a finite number above 0, got 0", model, (ids,), {"do_sample": True, "temperature": 0}),
        ("top_p must be above 0 and at most 1, got 1.5", model, (ids,), {"do_sample": True, "top_p": 1.5}),
        ("top_k must be an integer at least 0", model, (ids,), {"do_sample": True, "top_k": -1}),
        ("input_ids must be a tensor", model, ([[1, 2]],), {}),
        ("eos_token_id must be a token or several, got 'x'", model, (ids,), {"eos_token_id": "x"}),
        ("stop_strings need the model's tokenizer", model, (ids,), {"stop_strings": "x"}),
        ("stop_strings must be texts that are not empty, got ''", model, (ids,), {"stop_strings": ""}),
        ("seed must be an integer, got 1.5", model, (ids,), {"do_sample": True, "seed": 1.5}),
        ("padding on the left", model, (ids,), {"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}),
        ("padding on the left", model, (ids,), {"attention_mask": torch.tensor([[0, 1, 1, 2, 1]])}),
        ("padding on the left", model, (ids,), {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}),
    ]
    for words, target, arguments, more in cases:
        with pytest.raises(ConfigError, match=words):
            nogemm.generate(target, *arguments, **more)
    with pytest.raises(ConfigError, match=r"training mode; call model.eval\(\) first"):
        nogemm.generate(converted("llama").train(), ids)


def test_what_is_no_causal_model_is_refused() -> None:
    bert = tf.BertForMaskedLM(
        tf.BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    nogemm.convert_head(bert)
    with pytest.raises(ConfigError, match="no causal language model"):
        nogemm.generate(bert, decoders.prompts() % 60)


def test_logits_that_do_not_follow_from_the_head_are_refused() -> None:
    model, ids = converted("llama"), decoders.prompts()
    own = model.forward

    def negated(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = -out.logits
        return out

    model.forward = negated
    with pytest.raises(ConfigError, match="do not follow from its head"):
        nogemm.generate(model, ids)
