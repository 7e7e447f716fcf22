"""save_pretrained(state_dict=...): an average of weights is stored as given, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SMALL, Family, train_a_little
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nogemm
from nogemm.errors import CheckpointError


@pytest.fixture
def averaged(bert: Family) -> tuple[Any, Any]:
    """A model in training, and the average of its weights so far, a model of its own."""
    model = bert.build()
    nogemm.convert(model, SMALL)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        train_a_little(model)
        average.update_parameters(model)
    return model, average


def test_a_given_state_is_what_is_stored(bert: Family, averaged: tuple[Any, Any], tmp_path: Path) -> None:
    model, average = averaged
    ema = average.module.state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "shards", state_dict=ema, max_shard_size="8KB")
    model.save_pretrained(tmp_path / "positional", True, ema)
    model.save_pretrained(tmp_path / "online")
    for name, expected in (("shards", ema), ("positional", ema), ("online", before)):
        loaded = bert.auto.from_pretrained(tmp_path / name).state_dict()  # compares checksums, too
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not all(torch.equal(ema[key], before[key]) for key in ema)


def test_a_state_in_another_precision(bert: Family, averaged: tuple[Any, Any], tmp_path: Path) -> None:
    model, average = averaged
    half = {name: value.bfloat16() for name, value in average.module.state_dict().items()}
    model.save_pretrained(tmp_path / "model", state_dict=half)
    loaded = bert.auto.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert all(torch.equal(value, half[name].float()) for name, value in loaded.state_dict().items())


def test_a_state_that_does_not_fit_is_refused(averaged: tuple[Any, Any], tmp_path: Path) -> None:
    model, average = averaged
    with pytest.raises(CheckpointError, match=r"does not fit the BertForMaskedLM\. unknown: n_averaged, module\.bert"):
        model.save_pretrained(tmp_path / "model", state_dict=average.state_dict())
    state = average.module.state_dict()
    tables = "bert.encoder.layer.0.intermediate.tables"
    with pytest.raises(CheckpointError, match=rf"of another shape: {tables}$"):
        model.save_pretrained(tmp_path / "model", state_dict={**state, tables: state[tables][:1]})
    del state[tables]
    with pytest.raises(CheckpointError, match=rf"missing of converted FFNs: {tables}$"):
        model.save_pretrained(tmp_path / "model", state_dict=state)
    assert not list(tmp_path.rglob("*.safetensors"))
