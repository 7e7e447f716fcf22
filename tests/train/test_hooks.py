"""Distilling changes nothing of a model but its weights: no hook stays, both models can be pickled and copied."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from tiny_training import Pair, WordTokenizer, make_texts

from nogemm.train import distil

BOTH_STAGES: dict[str, Any] = {"tokens": 1_000, "batch_tokens": 256, "max_length": 16, "bar": False}
IDS = torch.ones(1, 3, dtype=torch.int64)


def test_distilling_leaves_no_hook(pair: Pair) -> None:
    texts = make_texts(60)
    before = [set(vars(model)) for model in (pair.model, pair.teacher)]
    report = distil(pair.model, pair.teacher, texts, validation=texts[:8], tokenizer=WordTokenizer(), **BOTH_STAGES)
    assert [stage.name for stage in report.stages] == ["layers", "model"]
    assert report.agreement is not None
    assert [set(vars(model)) for model in (pair.model, pair.teacher)] == before
    for model in (pair.model, pair.teacher):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            torch.testing.assert_close(twin.eval()(IDS)[0], model.eval()(IDS)[0])


def test_hooks_of_the_caller_stay(pair: Pair) -> None:
    seen: list[int] = []
    pair.teacher.register_forward_hook(lambda *_: seen.append(1))
    count = len(pair.teacher(IDS, output_hidden_states=True).hidden_states)  # transformers installs its own
    distil(pair.model, pair.teacher, make_texts(60), tokenizer=WordTokenizer(), **BOTH_STAGES)
    assert len(seen) > 2
    assert len(pair.teacher(IDS, output_hidden_states=True).hidden_states) == count
