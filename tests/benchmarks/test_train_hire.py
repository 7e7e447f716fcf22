"""The wide HireFFN of the benchmarks is trained for real: its loss falls, through the neurons that it keeps."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import nogemm
from benchmark_scripts import load
from nogemm.layers import HireFFN
from nogemm.models.directory import PACKAGED
from nogemm.models.loading import load_encoder, load_tokenizer

train_hire = load("train_hire")


@pytest.mark.slow
def test_a_narrow_one_learns_and_is_read_back(tmp_path: Path) -> None:
    tokenizer, teacher = load_tokenizer(PACKAGED), load_encoder(PACKAGED)
    model, head = train_hire.encoder(teacher, hidden=256, width=384)
    (layer,) = nogemm.converted(model).values()
    assert isinstance(layer, HireFFN)
    assert layer.config.keep == 0.05
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    one = next(train_hire.batches(tokenizer, 8))
    losses = train_hire.train(model, head, teacher, itertools.repeat(one), 20, 1e-3)
    assert len(losses) == 20
    assert losses[-1] < 0.8 * losses[0], losses
    assert 0.2 < train_hire.used(model.eval(), layer, one) <= 1
    changed = [name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])]
    assert {name.split(".")[0] for name in changed} >= {"up", "down"}, changed
    nogemm.save(model.eval(), tmp_path / "model")
    (again,) = nogemm.converted(load_encoder(tmp_path / "model")).values()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in layer.state_dict().items())


def test_batches_go_through_different_texts() -> None:
    source = train_hire.batches(load_tokenizer(PACKAGED), 2)
    first, second = next(source), next(source)
    assert first.ids.shape[0] == 2
    assert first.ids.shape[1] <= train_hire.LENGTH
    assert first.ids.tolist() != second.ids.tolist()
