"""Logits processors in nogemm.generate: transformers' own tokens, whatever the generation config asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import decoders
import nogemm
from nogemm import ConfigError, GenerationReport, HeadConfig, NotFiniteError
from nogemm.testing.compare import Mismatch, check_equal

NEW = 14
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "guidance_scale": {"guidance_scale": 1.5},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "watermarking_config": {"watermarking_config": tf.WatermarkingConfig(bias=9.0)},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 9.0), "eos_token_id": 7},
}
OF_TOKENS = (
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "min_length",
    "min_new_tokens",
    "sequence_bias",
)


def settings_of(name: str, greedy: list[int]) -> dict[str, Any]:
    """Return settings that change this greedy text."""
    first, third = greedy[0], greedy[2]
    return (
        SETTINGS.get(name)
        or {
            "bad_words_ids": {"bad_words_ids": [[third], greedy[4:6]]},
            "suppress_tokens": {"suppress_tokens": [third]},
            "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
            "min_length": {"min_length": 9, "eos_token_id": third},
            "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [third, first]},
            "sequence_bias": {"sequence_bias": [[[first], -50.0]]},
        }[name]
    )


def theirs(model: Any, ids: torch.Tensor, **how: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=torch.ones_like(ids), **how)


@pytest.mark.parametrize("name", [*SETTINGS, *OF_TOKENS])
def test_greedy_tokens_are_transformers_for_each_setting(name: str) -> None:
    model, ids = decoders.make("llama tied"), decoders.prompts(2)
    plain = theirs(model, ids)
    model.generation_config.update(**settings_of(name, plain[0, 5:].tolist()))
    model.generation_config.pad_token_id = 3
    expected = theirs(model, ids)
    nogemm.convert_head(model)
    report = GenerationReport()
    check_equal("tokens", nogemm.generate(model, ids, NEW, report=report), expected)
    assert report.dense == len(report.rows) >= report.tokens // len(ids) > 1  # some settings end a text early
    assert report.processors
    assert set(report.rows) == {decoders.V}
    with pytest.raises(Mismatch):  # the setting matters
        check_equal("without", plain, expected)


@pytest.mark.parametrize("mode", ["exact", "deferred", "high_recall", "fast"])
@pytest.mark.parametrize("kind", decoders.DECODERS)
def test_every_family_and_every_mode(kind: str, mode: str) -> None:
    model, ids = decoders.make(kind), decoders.prompts(2)
    model.generation_config.update(repetition_penalty=1.6, no_repeat_ngram_size=2)
    expected = theirs(model, ids)
    data = [{"input_ids": decoders.prompts(4, 12)}]
    nogemm.convert_head(model, HeadConfig(mode=mode, leading=4, sketch=4, rows=1), data)  # type: ignore[arg-type]
    report = GenerationReport()
    check_equal("tokens", nogemm.generate(model, ids, NEW, report=report), expected)
    assert report.processors == ["RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor"]
    assert (report.dense, report.proofs) == (2 * NEW, 0)
    model.generation_config.repetition_penalty = model.generation_config.no_repeat_ngram_size = None
    report = GenerationReport()
    other = nogemm.generate(model, ids, NEW, report=report)
    assert (report.dense, report.processors) == (0, [])
    with pytest.raises(Mismatch):
        check_equal("without", other, expected)


def test_a_first_token_that_is_forced() -> None:
    model, ids = decoders.make("llama"), decoders.prompts(2, 1)
    nogemm.convert_head(model)
    plain = nogemm.generate(model, ids, NEW)
    model.generation_config.forced_bos_token_id = forced = int(plain[0, 1]) ^ 1
    got = nogemm.generate(model, ids, NEW)
    check_equal("tokens", got, theirs(model, ids))
    assert got[:, 1].tolist() == [forced, forced]


def test_padded_prompts_are_penalised_as_there() -> None:
    model = decoders.make("llama")
    model.generation_config.update(repetition_penalty=3.0, pad_token_id=0)
    ids = decoders.prompts(2, 7)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False, attention_mask=mask)
    nogemm.convert_head(model)
    check_equal("tokens", nogemm.generate(model, ids, NEW, attention_mask=mask), expected)


def test_the_callers_processors_come_behind() -> None:
    model, ids = decoders.make("qwen2"), decoders.prompts(2)
    model.generation_config.repetition_penalty = 1.3
    seen: list[tuple[int, ...]] = []

    def odd(ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(ids_BT.shape))
        scores_BV[:, ::2] = -torch.inf
        return scores_BV

    own = tf.LogitsProcessorList([tf.MinLengthLogitsProcessor(100, 5), odd])
    expected = theirs(model, ids, logits_processor=own)
    seen.clear()
    nogemm.convert_head(model, HeadConfig(mode="deferred"))
    report = GenerationReport()
    got = nogemm.generate(model, ids, NEW, logits_processor=own, report=report)
    check_equal("tokens", got, expected)
    assert bool((got[:, 5:] % 2 == 1).all())
    assert seen == [(2, 5 + step) for step in range(NEW)]
    assert report.processors == ["RepetitionPenaltyLogitsProcessor", "MinLengthLogitsProcessor", "odd"]


def test_it_goes_on_from_a_cache_with_all_tokens_so_far() -> None:
    model, ids = decoders.make("llama"), decoders.prompts(2)
    model.generation_config.repetition_penalty = 1.6
    nogemm.convert_head(model)
    whole = nogemm.generate(model, ids, NEW)
    cache = tf.DynamicCache(config=model.config)
    half = nogemm.generate(model, ids, 6, cache=cache)
    check_equal("the rest", nogemm.generate(model, half, NEW - 6, cache=cache), whole)


def test_samples_follow_the_processed_distribution() -> None:
    model, ids = decoders.make("llama"), decoders.prompts()
    model.generation_config.update(min_p=0.7, suppress_tokens=[int(theirs(model, ids)[0, 5])])
    nogemm.convert_head(model)
    how: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 6}
    report = GenerationReport()
    drawn = [int(nogemm.generate(model, ids, 1, seed=seed, report=report, **how)[0, -1]) for seed in range(500)]
    names = ["SuppressTokensLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "MinPLogitsWarper"]
    assert list(dict.fromkeys(report.processors)) == names
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    logits[model.generation_config.suppress_tokens] = -torch.inf
    kept = logits.topk(6)
    shares = (kept.values / 3).softmax(0)
    shares = torch.where(shares >= 0.7 * shares.max(), shares, 0.0)
    shares = shares / shares.sum()
    counts = torch.bincount(torch.tensor(drawn), minlength=decoders.V)[kept.indices] / len(drawn)
    assert int((shares > 0).sum()) in range(1, 6)  # min_p leaves some of the six out
    assert abs(float(counts.sum()) - 1) < 1e-5
    assert float((counts - shares).abs().max()) < 0.08
    one = nogemm.generate(model, ids, 8, seed=3, **how)
    check_equal("the same seed", nogemm.generate(model, ids, 8, seed=3, **how), one)
    assert not torch.equal(nogemm.generate(model, ids, 8, seed=4, **how), one)


def test_a_sample_without_processors_is_drawn_as_before() -> None:
    model, ids = decoders.make("llama"), decoders.prompts()
    model.generation_config.update(renormalize_logits=True, remove_invalid_values=True, suppress_tokens=[])
    nogemm.convert_head(model)
    report = GenerationReport()
    nogemm.generate(model, ids, 4, do_sample=True, seed=1, report=report)
    assert (report.dense, report.processors) == (0, [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("constraints", [1]),
        ("force_words_ids", [[3]]),
        ("token_healing", True),
    ],
)
def test_another_way_to_decode_is_refused(name: str, value: Any) -> None:
    model = decoders.make("llama")
    nogemm.convert_head(model)
    setattr(model.generation_config, name, value)
    with pytest.raises(ConfigError, match=f"generate: {name}=.* of the model's generation config is not supported"):
        nogemm.generate(model, decoders.prompts(), 2)
    setattr(model.generation_config, name, 1 if name.startswith("num") else None)
    nogemm.generate(model, decoders.prompts(), 2)


def test_what_is_not_used_is_told() -> None:
    model = decoders.make("llama")
    nogemm.convert_head(model)
    model.generation_config.update(max_time=3.0, prompt_lookup_num_tokens=4, cache_implementation="static")
    with pytest.warns(UserWarning, match=r"max_time=3.0, prompt_lookup_num_tokens=4, cache_implementation='static' of"):
        nogemm.generate(model, decoders.prompts(), 2)


def test_stop_strings_of_the_config_need_a_tokenizer() -> None:
    model = decoders.make("llama")
    nogemm.convert_head(model)
    model.generation_config.stop_strings = ["x"]
    with pytest.raises(ConfigError, match=r"need the model's tokenizer; the model's generation config names \['x'\]"):
        nogemm.generate(model, decoders.prompts(), 2)


def test_bad_processors_are_named() -> None:
    model, ids = decoders.make("llama"), decoders.prompts(2)
    nogemm.convert_head(model)
    cases: list[tuple[str, Any, type[Exception]]] = [
        ("logits_processor must be a list of functions", lambda i, s: s, ConfigError),
        ("logits_processor must be a list of functions", [3], ConfigError),
        (
            r"the logits processor <lambda> must return scores of the shape \(2, 307\), got NoneType",
            [lambda i, s: None],
            ConfigError,
        ),
        (r"must return scores .* got \(2, 3\)", [lambda i, s: s[:, :3]], ConfigError),
        ("leave sequence 0 no token for position 5", [lambda i, s: s * torch.nan], NotFiniteError),
        ("leave sequence 1 no token for position 5", [_nothing_for_one], NotFiniteError),
    ]
    for words, own, kind in cases:
        with pytest.raises(kind, match=words):
            nogemm.generate(model, ids, 2, logits_processor=own)
    model.generation_config.bad_words_ids = []
    with pytest.raises(ConfigError, match=r"the model's generation config makes no logits processors: .*bad_words_ids"):
        nogemm.generate(model, ids, 2)
    model.generation_config.bad_words_ids = None
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(NotFiniteError, match="the logits of sequence 0 before token 5 are not finite"):
        nogemm.generate(model, ids, 2, logits_processor=[lambda i, s: s])


def _nothing_for_one(ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
    scores_BV[1] = -torch.inf
    return scores_BV


def test_a_sequence_that_has_ended_may_have_no_token() -> None:
    model, ids = decoders.make("llama"), decoders.prompts(2)
    nogemm.convert_head(model)
    plain = nogemm.generate(model, ids, 6)
    end = int(plain[1, 5])

    def none_behind_the_end(ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        scores_BV[(ids_BT[:, 5:] == end).any(1)] = -torch.inf
        return scores_BV

    got = nogemm.generate(model, ids, 6, eos_token_id=end, pad_token_id=9, logits_processor=[none_behind_the_end])
    assert got[1, 5:].tolist() == [end, *[9] * (got.shape[1] - 6)]
