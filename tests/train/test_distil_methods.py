"""distil() on the other methods: both stages lower their losses, although they know none of the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_training import Pair, WordTokenizer, make_pair, make_texts, tiny_bert
from torch import Tensor, nn

import nogemm
from nogemm.layers import SumFFN

SMALL = nogemm.BHConfig(rounds=2, block=8)
CONFIGS: list[Any] = [
    nogemm.LookupConfig(tables=8, bits=4, projection=nogemm.HadamardChainConfig(depth=2)),
    nogemm.YosoConfig(hashes=64, bits=3),
    nogemm.HireConfig(keep=0.3),
    nogemm.SwitchConfig(experts=4, hidden=32),
    nogemm.ShuffleConfig(block=16),
    nogemm.SlideConfig(bits=3, tables=4),
    nogemm.MongooseConfig(bits=3, tables=4),
    nogemm.TokenTableConfig(),
    nogemm.SumConfig(terms=(nogemm.DenseConfig(hidden=8), nogemm.LookupConfig(tables=4, bits=4, projection=SMALL))),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_both_stages_lower_their_losses(config: Any) -> None:
    pair = make_pair(config)
    report = nogemm.distil(
        pair.model,
        pair.teacher,
        make_texts(),
        tokenizer=WordTokenizer(),
        tokens=16_000,
        batch_tokens=256,
        stage1_share=0.6,
        lr_other=1e-2,
        bar=False,
    )
    assert report.stages[0].last["loss"] < report.stages[0].first["loss"]
    assert report.stages[1].last["loss"] < report.stages[1].first["loss"]
    assert all(layer.fitted == "distilled" for layer in nogemm.converted(pair.model).values())


def rows_of(model: nn.Module) -> list[Tensor]:
    """Return the rows of the token tables beside kept FFNs."""
    layers = [layer for layer in nogemm.converted(model).values() if isinstance(layer, SumFFN)]
    return [layer.layers[1].get_parameter("rows") for layer in layers]


@pytest.mark.parametrize("optimizer", ["adamw", "lazy-adam"])
def test_tables_beside_the_layers_that_are_kept(optimizer: Any) -> None:
    """Layers are left out, the others keep their FFNs, and the rows of the texts' tokens learn what is missing."""
    teacher = tiny_bert(layers=4)
    model = tiny_bert(layers=4)
    model.load_state_dict(teacher.state_dict())
    kept = nogemm.keep_layers(model, [0, 3])
    table = nogemm.TokenTableConfig(start="zero")
    nogemm.convert(model, nogemm.SumConfig(terms=(nogemm.DenseConfig(), table)))
    texts = [text for text in make_texts() if "word7 " not in f"{text} "]
    report = nogemm.distil(
        model, teacher, texts, tokenizer=WordTokenizer(), tokens=12_000, batch_tokens=256, hidden_map=kept,
        optimizer=optimizer, lr_tables=5e-2, lr_backbone=0.0, lr_other=0.0, bar=False,
    )  # fmt: skip
    assert [stage.name for stage in report.stages] == ["model"]
    assert report.stages[0].last["loss"] < 0.9 * report.stages[0].first["loss"]
    unseen, seen = 2 + 7, 2 + 6
    for rows in rows_of(model):
        assert rows[seen].any()
        assert not rows[unseen].any()


def test_rows_solved_after_stage_one_are_the_means_of_what_is_left() -> None:
    config = nogemm.SumConfig(
        terms=(nogemm.LookupConfig(tables=4, bits=3, projection=SMALL), nogemm.TokenTableConfig(start="zero"))
    )
    pair: Pair = make_pair(config)
    report = nogemm.distil(
        pair.model, pair.teacher, make_texts(), tokenizer=WordTokenizer(), tokens=4_000, batch_tokens=256,
        stage1_share=1.0, solve_tokens=3_000, bar=False,
    )  # fmt: skip
    left = [report.stages[0].last[name] for name in nogemm.converted(pair.model)]
    assert max(left) < 1.0
    assert all(not torch.equal(rows[2], rows[3]) for rows in rows_of(pair.model))
