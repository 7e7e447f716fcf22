"""convert(faster_at=): a site whose layer is measured to be slower stays dense, and the report says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import decoders
import nogemm
from nogemm.convert import faster
from nogemm.layers import FFN, HireConfig, HireFFN
from nogemm.layers._base import PackedFFN

TOPK = HireConfig(keep=0.4)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Give times instead of taking them, and note what would have been timed."""
    told: dict[str, Any] = {"us": (812.4, 640.0), "calls": []}

    def times(ours: PackedFFN, dense: PackedFFN, x: torch.Tensor) -> tuple[float, float]:
        assert ours(x).shape == dense(x).shape
        told["calls"].append((ours, dense, x))
        return told["us"]

    monkeypatch.setattr(faster, "times", times)
    return told


def test_slower_sites_stay_dense_and_are_named(clock: dict[str, Any]) -> None:
    model, ids = decoders.make("llama"), decoders.prompts(2)
    before = model(ids).logits
    report = nogemm.convert(model, TOPK, faster_at=1)
    assert not report.sites
    assert [one.name for one in report.slower] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert "for 1 token a HireFFN in int8 takes 812 us here, the dense FFN 640 us" in report.slower[0].reason
    assert "left dense, as it is faster:" in str(report)
    assert report.to_dict()["slower"][1]["name"] == "model.layers.1.mlp"
    assert len(clock["calls"]) == 1, "equal sites are timed once"
    assert not nogemm.converted(model)
    assert torch.equal(model(ids).logits, before)
    again = nogemm.convert(model, TOPK)  # told otherwise
    assert len(again.sites) == 2
    assert not again.slower


def test_faster_sites_are_converted(clock: dict[str, Any]) -> None:
    clock["us"] = (100.0, 640.0)
    model = decoders.make("llama")
    report = nogemm.convert(model, TOPK, layers=[1], faster_at=16, timed_in="bf16")
    assert [site.name for site in report.sites] == ["model.layers.1.mlp"]
    assert not report.slower
    ((ours, dense, x),) = clock["calls"]
    assert (ours.dtype, dense.dtype, x.shape) == ("bf16", "bf16", (16, 24))
    assert isinstance(nogemm.converted(model)["model.layers.1.mlp"], FFN)


def test_what_fires_is_timed_on_activations_or_as_expected(clock: dict[str, Any]) -> None:
    config = HireConfig(keep=0.1, select="active")

    def relu_decoder() -> Any:
        model = decoders.make("gpt2")
        for block in model.transformer.h:
            block.mlp.act = torch.nn.ReLU()
        return model

    nogemm.convert(relu_decoder(), config, faster_at=3)
    assert clock["calls"][-1][0].config.select == "topk", "no activations: as many neurons as keep expects"
    samples = [{"input_ids": decoders.prompts(1, 9)}]
    nogemm.convert(relu_decoder(), config, data=samples, faster_at=3)
    ours, _, x = clock["calls"][-1]
    assert ours.config.select == "active"
    assert x.shape == (3, 24)
    assert not torch.equal(x, clock["calls"][0][2])


def test_times_are_taken() -> None:
    layer = HireConfig(keep=0.1).build(32, hidden=64).eval()
    assert isinstance(layer, HireFFN)
    found = faster.times(layer.pack("fp32"), layer, torch.randn(2, 32))
    assert all(math.isfinite(us) and us > 0 for us in found)


def test_bad_numbers_are_named_and_change_nothing() -> None:
    model = decoders.make("llama")
    with pytest.raises(nogemm.ConfigError, match="faster_at"):
        nogemm.convert(model, TOPK, faster_at=0)
    with pytest.raises(nogemm.ConfigError, match="timed_in"):
        nogemm.convert(model, TOPK, faster_at=1, timed_in="int4")
    assert not nogemm.converted(model)
