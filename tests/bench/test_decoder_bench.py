"""`nogemm bench decoder` on a small decoder: rows, checks that refuse, the share of neurons that fire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nogemm.bench.contenders import decoder as contenders
from nogemm.bench.decoder import DecoderArgs, run_decoder_bench, write_reference
from nogemm.errors import ConfigError

SHAPE = {"d": 64, "hidden": 512, "layers": 2, "heads": 2, "vocabulary": 99, "active": 0.1, "seed": 0}


def test_rows_are_verified_and_timed() -> None:
    small = {name: value for name, value in SHAPE.items() if name != "seed"}
    args = DecoderArgs(**small, prompt=8, against=("torch-bf16",), threads=1, seconds=0.001)  # type: ignore[arg-type]
    kept: list[dict[str, Any]] = []
    result = run_decoder_bench(args, keep=kept.append)
    ours, dense = result["rows"]
    assert (ours["contender"], dense["contender"]) == ("nogemm-int8", "torch-bf16")
    for row in (ours, dense):
        assert row["verified"], row
        assert row["us_median"] > 0
    assert ours["recall"] >= 0.99
    assert 0.05 < ours["kept"] < 0.2
    assert ours["bytes_read"] < dense["bytes_read"] / 2
    assert json.loads(json.dumps(kept[-1]))["rows"]


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("TorchDecoder", "torch-int8"),
        ("OpenVinoDecoder", "openvino-int8"),
        ("OurDecoder", "nogemm-int8"),
        ("ExportedDecoder", "nogemm-openvino-int8"),
    ],
)
def test_another_models_logits_are_refused(kind: str, engine: str, tmp_path: Path) -> None:
    if "openvino" in engine:
        pytest.importorskip("openvino")
        pytest.importorskip("nncf")
    file = tmp_path / "reference.safetensors"
    write_reference(SHAPE, 8, file)
    settings = {"shape": SHAPE, "file": str(file), "engine": engine, "keep": 0.1, "sketch": "int4"}
    made = getattr(contenders, kind)(settings)
    assert made.prepare({"batch": 1})["verified"]
    ones = torch.ones(40, 30, 30)
    assert bool((torch.bmm(ones, ones) == 30).all()), "torch is as it was"
    tokens = [made.draw() for _ in range(contenders.ALLOWED_BEYOND + 1)]
    assert tokens[-1] == tokens[0], "the cache is cut back, and decoding begins anew"
    made.logits_NV = made.logits_NV.roll(1, 0)
    facts = made.prepare({"batch": 1})
    assert not facts["verified"]
    assert "logits are off by" in facts["error"]


def test_so_many_neurons_fire_as_were_asked_for() -> None:
    model = contenders.make_decoder(SHAPE)
    layer = model.model.decoder.layers[0]
    states = torch.nn.functional.layer_norm(torch.randn(400, 64), (64,))
    fires = layer.fc1.weight.float() @ states.T + layer.fc1.bias.float().unsqueeze(1) > 0
    assert abs(float(fires.double().mean()) - 0.1) < 0.01


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"against": ("tpu",)}, "unknown engine 'tpu'"),
        ({"heads": 3}, "--d must be a multiple of --heads"),
        ({"active": 1.0}, "--active must be above 0 and below 1"),
        ({"prompt": 250}, "--prompt at most 240"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run_decoder_bench(DecoderArgs(**change))
