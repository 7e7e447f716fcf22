"""distil() on the other methods: both stages lower their losses, although they know none of the layers."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_training import WordTokenizer, make_pair, make_texts

import nogemm

SMALL = nogemm.BHConfig(rounds=2, block=8)
CONFIGS: list[Any] = [
    nogemm.LookupConfig(tables=8, bits=4, projection=nogemm.HadamardChainConfig(depth=2)),
    nogemm.YosoConfig(hashes=64, bits=3),
    nogemm.HireConfig(keep=0.3),
    nogemm.SwitchConfig(experts=4, hidden=32),
    nogemm.ShuffleConfig(block=16),
    nogemm.SlideConfig(bits=3, tables=4),
    nogemm.MongooseConfig(bits=3, tables=4),
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
