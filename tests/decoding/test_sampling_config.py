"""Samples by the model's generation config: its temperature, top_k and top_p against transformers' own warpers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import decoders
import nogemm
from nogemm import ConfigError, GenerationReport, HeadConfig
from nogemm.decoding.sampling import Sampling, gumbel
from nogemm.testing.compare import Mismatch, check_equal

NEW = 8
NAMED: dict[str, Any] = {"temperature": 2.5, "top_k": 9, "top_p": 0.8}


def warped(config: dict[str, Any], scores_BV: torch.Tensor) -> torch.Tensor:
    """Return scores as transformers' own generate leaves them, the others at minus infinity."""
    warpers = tf.LogitsProcessorList(
        [
            tf.TemperatureLogitsWarper(config.get("temperature", 1.0)),
            tf.TopKLogitsWarper(config.get("top_k", decoders.V)),
            tf.TopPLogitsWarper(config.get("top_p", 1.0)),
        ]
    )
    ids_B1: Any = torch.zeros(len(scores_BV), 1, dtype=torch.int64)
    return warpers(ids_B1, scores_BV)


@torch.no_grad()
def theirs(model: Any, ids: torch.Tensor, config: dict[str, Any], seed: int) -> torch.Tensor:
    """Sample without a cache: the largest sum of a score that transformers leaves and of our noise."""
    for _ in range(NEW):
        scores = warped(config, model(ids).logits[:, -1])
        noise = torch.stack([gumbel(decoders.V, seed, ids.shape[1], row) for row in range(len(ids))])
        ids = torch.cat((ids, (scores + noise).argmax(1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize(
    "config",
    [NAMED, {"temperature": 0.4}, {"top_k": 4}, {"top_p": 0.3}, {"top_k": 1}, {"top_k": 30, "top_p": 0.95}],
    ids=str,
)
def test_the_same_tokens_are_left_as_by_transformers(config: dict[str, Any]) -> None:
    logits = 3 * torch.randn(40, decoders.V, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = logits[:, 7]  # ties
    rule = Sampling(config.get("temperature"), config.get("top_k"), config.get("top_p"), 0)
    check_equal("left", rule.allowed(logits / rule.temperature).isfinite(), warped(config, logits).isfinite())
    with pytest.raises(Mismatch):
        check_equal("all", torch.ones_like(logits, dtype=torch.bool), warped({"top_k": 20}, logits).isfinite())


@pytest.mark.parametrize("mode", ["exact", "deferred"])
@pytest.mark.parametrize("kind", ["llama tied", "gemma2 capped", "granite scaled"])
def test_a_sample_takes_what_the_config_names(kind: str, mode: str) -> None:
    model, ids = decoders.make(kind), decoders.prompts(2)
    expected = theirs(model, ids, NAMED, 3)
    plain = theirs(model, ids, {}, 3)
    nogemm.convert_head(model, HeadConfig(mode=mode))  # type: ignore[arg-type]
    model.generation_config.update(**NAMED)
    sample: dict[str, Any] = {"do_sample": True, "seed": 3}
    check_equal("of the config", nogemm.generate(model, ids, NEW, **sample), expected)
    with pytest.raises(Mismatch):
        check_equal("of the model's own distribution", plain, expected)
    check_equal("told otherwise", nogemm.generate(model, ids, NEW, temperature=1, top_k=0, top_p=1, **sample), plain)
    for name, value in (("temperature", 0.5), ("top_k", 3), ("top_p", 0.2)):
        mixed = theirs(model, ids, {**NAMED, name: value}, 3)
        given: dict[str, Any] = {**sample, name: value}
        check_equal(f"{name} of the call", nogemm.generate(model, ids, NEW, **given), mixed)
    model.generation_config.update(temperature=None, top_k=None, top_p=None)
    check_equal("nothing named", nogemm.generate(model, ids, NEW, **sample), plain)


def test_processors_stand_among_the_warpers_of_the_config() -> None:
    model, ids = decoders.make("llama"), decoders.prompts()
    nogemm.convert_head(model)
    model.generation_config.update(**NAMED, repetition_penalty=1.2, min_p=0.01)
    report = GenerationReport()
    nogemm.generate(model, ids, 2, do_sample=True, report=report)
    names = ["RepetitionPenalty", "Temperature", "TopK", "TopP", "MinP"]
    assert [name.replace("LogitsProcessor", "").replace("LogitsWarper", "") for name in report.processors] == names
    report = GenerationReport()
    nogemm.generate(model, ids, 2, do_sample=True, temperature=1.0, top_k=0, report=report)
    assert len(report.processors) == 3


def test_whether_to_sample_is_the_callers_unless_the_config_is_asked() -> None:
    model, ids = decoders.make("llama"), decoders.prompts()
    nogemm.convert_head(model)
    greedy = nogemm.generate(model, ids, NEW)
    check_equal("no word in the config", nogemm.generate(model, ids, NEW, do_sample=None), greedy)
    model.generation_config.update(do_sample=True, **NAMED)
    check_equal("greedy is the default", nogemm.generate(model, ids, NEW), greedy)
    drawn = nogemm.generate(model, ids, NEW, do_sample=True, seed=3)
    check_equal("asked", nogemm.generate(model, ids, NEW, do_sample=None, seed=3), drawn)
    assert not torch.equal(drawn, greedy)


def test_settings_that_turn_nothing_on_leave_the_search() -> None:
    model, ids = decoders.make("llama"), decoders.prompts()
    nogemm.convert_head(model)
    model.generation_config.update(temperature=1.0, top_k=0, top_p=1.0)
    report = GenerationReport()
    nogemm.generate(model, ids, 4, do_sample=True, seed=1, report=report)
    assert report.dense == 0
    model.generation_config.top_k = 5
    nogemm.generate(model, ids, 4, do_sample=True, seed=1, report=report)
    assert report.dense == 4


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", 0.0, "temperature must be a finite number above 0, got 0.0"),
        ("top_p", 1.5, "top_p must be above 0 and at most 1, got 1.5"),
        ("top_k", -3, "top_k must be an integer at least 0, got top_k=-3"),
    ],
)
def test_a_bad_value_of_the_config_is_named_as_such(name: str, value: Any, words: str) -> None:
    model = decoders.make("llama")
    nogemm.convert_head(model)
    setattr(model.generation_config, name, value)
    with pytest.raises(ConfigError, match=f"{words}; the model's generation config names it"):
        nogemm.generate(model, decoders.prompts(), 2, do_sample=True)
    nogemm.generate(model, decoders.prompts(), 2)  # greedy: it has no effect
