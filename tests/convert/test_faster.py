"""convert(faster_at=): a site whose layer is measured to be slower stays dense, and the report says so."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import decoders
import nogemm
import people
from nogemm.convert import faster
from nogemm.layers import FFN, HireConfig, HireFFN
from nogemm.layers._base import PackedFFN

TOPK = HireConfig(keep=0.4)
ACTIVE = HireConfig(keep=0.1, select="active")


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


def relu_decoder() -> Any:
    model = decoders.make("gpt2")
    for block in model.transformer.h:
        block.mlp.act = torch.nn.ReLU()
    return model


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
    nogemm.convert(relu_decoder(), ACTIVE, faster_at=3)
    assert clock["calls"][-1][0].config.select == "topk", "no activations: as many neurons as keep expects"
    samples = [{"input_ids": decoders.prompts(1, 9)}]
    nogemm.convert(relu_decoder(), ACTIVE, data=samples, faster_at=3)
    ours, _, x = clock["calls"][-1]
    assert ours.config.select == "active"
    assert x.shape == (3, 24)
    assert not torch.equal(x, clock["calls"][0][2])


def test_decoders_that_need_no_training_are_timed_unless_told_otherwise(
    clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = nogemm.convert(relu_decoder(), ACTIVE)
    assert (len(small.sites), clock["calls"], small.timing_seconds) == (2, [], 0), "as small as that a call costs more"
    monkeypatch.setattr(faster, "WORTH_TIMING", 24 * 96 * 2)
    report = nogemm.convert(relu_decoder(), ACTIVE)
    assert not report.sites
    assert len(report.slower) == 2
    ((_, dense, x),) = clock["calls"]
    assert (dense.dtype, x.shape) == ("int8", (1, 24))
    assert "with faster_at=None it is converted all the same" in str(report)
    assert "timed beside the dense FFNs: " in str(report)
    assert report.to_dict()["timing_seconds"] > 0
    clock["us"] = (100.0, 640.0)
    assert len(nogemm.convert(relu_decoder(), ACTIVE).sites) == 2
    assert len(clock["calls"]) == 2
    monkeypatch.setattr(faster, "WORTH_TIMING", 24 * 96 * 2 + 1)
    nogemm.convert(relu_decoder(), ACTIVE)
    assert len(clock["calls"]) == 2


@pytest.mark.parametrize(
    ("make", "config", "how"),
    [
        (relu_decoder, ACTIVE, {"faster_at": None}),
        (lambda: relu_decoder().train(), ACTIVE, {}),
        (lambda: relu_decoder().transformer, ACTIVE, {}),  # states alone: nothing is decoded
        (lambda: decoders.make("llama"), TOPK, {}),  # to be distilled
        (relu_decoder, nogemm.TreeConfig(depth=2), {}),
    ],
    ids=["told otherwise", "in training", "no head", "needs training", "no HireFFN"],
)
def test_others_are_converted_without_timing(
    make: Any, config: Any, how: dict[str, Any], clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faster, "WORTH_TIMING", 0)
    report = nogemm.convert(make(), config, **how)
    assert (len(report.sites), len(report.slower), clock["calls"]) == (2, 0, [])


def test_the_command_says_what_it_left_dense(
    tmp_path: Path, clock: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faster, "WORTH_TIMING", 0)
    model = people.relu_decoder(tmp_path / "opt")
    words = ("convert", model, tmp_path / "out", "--method", "hire", "--set", "select=active")
    assert people.run(*words, "--json", tmp_path / "said.json") == 0
    assert "left dense, as it is faster: " in capsys.readouterr().out
    assert len(json.loads((tmp_path / "said.json").read_text())["slower"]) == 2
    assert people.run(*words[:2], tmp_path / "all", *words[3:], "--faster-at", "none") == 0
    assert "left dense" not in capsys.readouterr().out
    for word in ("0", "-1", "soon", "1.5"):
        assert people.run(*words[:2], tmp_path / "bad", *words[3:], "--faster-at", word) == 2
        assert f"--faster-at must be a number of tokens from 1, auto or none, got '{word}'" in capsys.readouterr().err


def test_times_are_taken() -> None:
    layer = HireConfig(keep=0.1).build(32, hidden=64).eval()
    assert isinstance(layer, HireFFN)
    found = faster.times(layer.pack("fp32"), layer, torch.randn(2, 32))
    assert all(math.isfinite(us) and us > 0 for us in found)


def test_bad_numbers_are_named_and_change_nothing() -> None:
    model = decoders.make("llama")
    with pytest.raises(nogemm.ConfigError, match="faster_at"):
        nogemm.convert(model, TOPK, faster_at=0)
    with pytest.raises(nogemm.ConfigError, match=r"faster_at must be a number of tokens, .* got 'soon'"):
        nogemm.convert(model, TOPK, faster_at="soon")  # type: ignore[arg-type]
    with pytest.raises(nogemm.ConfigError, match="timed_in"):
        nogemm.convert(model, TOPK, faster_at=1, timed_in="int4")
    assert not nogemm.converted(model)
