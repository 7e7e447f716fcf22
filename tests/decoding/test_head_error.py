"""head_error: what a search and estimates are worth, measured against all logits."""

from __future__ import annotations

import math

import pytest
import torch

import decoders
import nogemm
from nogemm import ConfigError, HeadConfig
from nogemm.decoding.head_error import _compare
from nogemm.decoding.sampling import nucleus

DATA = [{"input_ids": decoders.prompts(4, 12)}]


def test_errors_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.4, 0.4, 0.2]])
    got = _compare(p.log(), q.log() + 3, torch.tensor([1]), torch.Generator().manual_seed(0)).tolist()
    entropy = -sum(value * math.log(value) for value in (0.5, 0.3, 0.2))
    other = -sum(value * math.log(value) for value in (0.4, 0.4, 0.2))
    divergence = 0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4)
    assert got[:5] == pytest.approx([0, entropy, abs(entropy - other), divergence, math.log(0.5 / 0.4)], rel=1e-5)
    assert got[7] == pytest.approx(0, abs=1e-6)
    assert nucleus(p.log(), 0.49).tolist() == [[True, False, False]]
    assert nucleus(p.log(), 0.51).tolist() == [[True, True, False]]


def test_better_codes_are_nearer() -> None:
    found = []
    for leading, rows in ((24, 307), (24, 20), (0, 1)):
        model = decoders.make("llama")
        nogemm.convert_head(model, HeadConfig(mode="fast", leading=leading, sketch=max(leading, 4), rows=rows), DATA)
        found.append(nogemm.head_error(model, DATA, states=40))
    exact, good, poor = found
    assert exact.states == 40
    assert exact.recall == 1
    assert exact.divergence == pytest.approx(0, abs=1e-9)
    assert exact.perplexity == pytest.approx(exact.dense_perplexity)
    assert 0 < good.divergence < poor.divergence
    assert good.recall > poor.recall
    assert good.perplexity == pytest.approx(good.dense_perplexity, rel=0.01)
    assert 0 < good.log_prob_error < poor.log_prob_error
    assert good.entropy == pytest.approx(poor.entropy)
    assert 0 < good.entropy_error < poor.entropy_error
    assert 0 <= good.top_p_error <= poor.top_p_error


def test_bad_input_is_named() -> None:
    model = decoders.make("llama")
    with pytest.raises(ConfigError, match="head_error: the model's head is dense"):
        nogemm.head_error(model, DATA)
    nogemm.convert_head(model)
    with pytest.raises(ConfigError, match="head_error: the data gave no token"):
        nogemm.head_error(model, [])
