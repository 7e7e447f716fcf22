"""Ctrl-C inside a model: the same cache goes on to the same text, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

import decoders
import nogemm
from nogemm import ConfigError, HeadConfig
from nogemm.decoding import caches
from nogemm.testing.compare import Mismatch, check_equal

NEW = 12
_SMALL: dict[str, Any] = {
    "vocab_size": decoders.V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
    "eos_token_id": None,
    "pad_token_id": None,
}
HYBRIDS: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: tf.Lfm2ForCausalLM(
        tf.Lfm2Config(**_SMALL, num_hidden_layers=3, layer_types=["conv", "conv", "full_attention"])
    ),
    "qwen3 next": lambda: tf.Qwen3NextForCausalLM(
        tf.Qwen3NextConfig(
            **_SMALL,
            num_hidden_layers=3,
            layer_types=["linear_attention", "linear_attention", "full_attention"],
            head_dim=16,
            linear_num_key_heads=1,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=0,
            decoder_sparse_step=100,
        )
    ),
    "falcon h1": lambda: tf.FalconH1ForCausalLM(
        tf.FalconH1Config(
            **_SMALL, num_hidden_layers=3, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
        )
    ),
}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    model = (HYBRIDS[kind]() if kind in HYBRIDS else decoders.make(kind)).eval()
    model.generation_config.eos_token_id = None
    return model


class Interrupt:
    """Raises KeyboardInterrupt in the second layer of a model, in its run number `at`."""

    def __init__(self, model: Any, at: int) -> None:
        self.at, self.runs = at, 0
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)
        self.handle = layers[1].register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.runs += 1
        if self.runs == self.at:
            self.handle.remove()
            raise KeyboardInterrupt


def interrupted(model: Any, ids: torch.Tensor, cache: Any, at: int) -> torch.Tensor:
    """Generate until the run number `at` is interrupted; return all tokens that were streamed."""
    seen: list[torch.Tensor] = []
    Interrupt(model, at)
    with pytest.raises(KeyboardInterrupt):
        nogemm.generate(model, ids, NEW, cache=cache, streamer=seen.append)
    return torch.cat((ids, *(token.unsqueeze(1) for token in seen)), 1)


def held(cache: Any) -> int:
    return int(cache.get_seq_length())


@pytest.mark.parametrize("at", [1, 2, 6])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_hybrid_goes_on(kind: str, at: int) -> None:
    model, ids = make(kind), decoders.prompts(2, 6)
    nogemm.convert_head(model)
    whole = nogemm.generate(model, ids, NEW)
    cache = caches.new_cache(model)
    so_far = interrupted(model, ids, cache, at)
    check_equal("so far", so_far, whole[:, : 6 + at - 1])
    assert held(cache) == (so_far.shape[1] - 1 if at > 1 else 0)
    check_equal("the rest", nogemm.generate(model, so_far, whole.shape[1] - so_far.shape[1], cache=cache), whole)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_without_copies_the_text_would_be_another(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make(kind), decoders.prompts(2, 6)
    nogemm.convert_head(model)
    whole = nogemm.generate(model, ids, NEW)
    cache = caches.new_cache(model)
    monkeypatch.setattr(caches, "_copied_states", lambda states: states)
    so_far = interrupted(model, ids, cache, 6)
    with pytest.raises(Mismatch):
        check_equal("the rest", nogemm.generate(model, so_far, whole.shape[1] - so_far.shape[1], cache=cache), whole)


@pytest.mark.parametrize("at", [1, 4, 9])
@pytest.mark.parametrize("mode", ["exact", "deferred"])
@pytest.mark.parametrize("kind", ["llama", "gemma3 sliding", "gpt2"])
def test_a_plain_model_goes_on(kind: str, mode: str, at: int) -> None:
    model, ids = make(kind), decoders.prompts(2, 11)
    config = HeadConfig(mode=mode, verify_every=5, leading=4, sketch=4, rows=1)  # type: ignore[arg-type]
    nogemm.convert_head(model, config)
    whole = nogemm.generate(model, ids, NEW)
    for cache in (tf.DynamicCache(config=model.config), tf.DynamicCache()):
        if not cache.layers and kind == "gemma3 sliding":
            continue  # transformers' masks there need the model's own kind
        so_far = interrupted(model, ids, cache, at)
        check_equal("so far", so_far, whole[:, : so_far.shape[1]])
        assert held(cache) == (so_far.shape[1] - 1 if so_far.shape[1] > 11 else 0)
        check_equal("the rest", nogemm.generate(model, so_far, whole.shape[1] - so_far.shape[1], cache=cache), whole)


def test_a_cache_that_cannot_go_back_is_refused() -> None:
    model, ids = make("llama"), decoders.prompts(1, 6)
    nogemm.convert_head(model)
    whole = nogemm.generate(model, ids, NEW)
    cache = tf.StaticCache(config=model.config, max_cache_len=40)
    half = nogemm.generate(model, ids, 4, cache=cache)
    check_equal("a static cache", nogemm.generate(model, half, NEW - 4, cache=cache), whole)
    cache = tf.StaticCache(config=model.config, max_cache_len=40)
    so_far = interrupted(model, ids, cache, 4)
    with pytest.raises(ConfigError, match=r"a StaticLayer cannot go back; give all tokens so far and a new cache"):
        nogemm.generate(model, so_far, 2, cache=cache)
    check_equal("a new one", nogemm.generate(model, so_far, whole.shape[1] - so_far.shape[1]), whole)


def test_an_interruption_while_the_cache_goes_back_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make("llama"), decoders.prompts(1, 6)
    nogemm.convert_head(model)
    nogemm.generate(model, ids, 2)
    cache, inside, copied = tf.DynamicCache(config=model.config), Interrupt(model, 2), caches._copied

    def stop(state: Any) -> Any:
        if inside.runs == 2:
            raise KeyboardInterrupt
        return copied(state)

    monkeypatch.setattr(caches, "_copied", stop)
    with pytest.raises(KeyboardInterrupt):
        nogemm.generate(model, ids, NEW, cache=cache)
    with pytest.raises(
        ConfigError, match="left this cache in the middle of a token, and a DynamicCache cannot go back"
    ):
        nogemm.generate(model, decoders.prompts(1, 20), 2, cache=cache)


def test_a_hybrid_takes_no_token_back() -> None:
    model = make("lfm2")
    nogemm.convert_head(model, HeadConfig(mode="deferred"))
    with pytest.raises(ConfigError, match=r"mode 'deferred' needs .*; LinearAttentionLayer cannot: .* mode 'exact'"):
        nogemm.generate(model, decoders.prompts(), 2)


def test_a_cache_of_another_kind_is_named() -> None:
    model, ids = make("llama"), decoders.prompts()
    nogemm.convert_head(model)
    both = tf.EncoderDecoderCache(tf.DynamicCache(), tf.DynamicCache())
    with pytest.raises(ConfigError, match="cache must be one of a decoder alone, such as DynamicCache, got EncoderDec"):
        nogemm.generate(model, ids, 2, cache=both)
