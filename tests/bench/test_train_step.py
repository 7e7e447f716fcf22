"""The training step: gradients are checked before the clock starts, and both sides do the same work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nogemm.bench.engine.pool import write_pool
from nogemm.bench.train_step import StepContender, TrainStepArgs, gradients, run_train_step, skewed_tokens
from nogemm.errors import ConfigError

TINY: dict[str, Any] = {"d": 16, "hidden": 32, "set": ("tables=8", "bits=3", "projection.block=8"), "tokens": 64}


def contender(folder: Path, kind: str) -> StepContender:
    write_pool(folder / "uniform", 256, 16, seed=1)
    settings = {
        "d": 16,
        "hidden": 32,
        "activation": "gelu",
        "seed": 0,
        "folder": str(folder),
        "kind": kind,
        "update": "fused",
        "method": "lookup",
        "set": list(TINY["set"]),
    }
    return StepContender(settings)


def test_rows_of_both_sides_in_one_run() -> None:
    result = run_train_step(TrainStepArgs(**TINY, threads=1, rounds=2))
    rows = json.loads(json.dumps(result))["rows"]
    assert [(row["codes"], row["contender"]) for row in rows] == [
        (codes, name) for codes in ("uniform", "skewed") for name in ("nogemm", "dense-fused", "dense-foreach")
    ]
    for row in rows:
        assert row["verified"] is True, row
        assert set(row["parts"]) == {"forward", "backward", "update"}
        assert row["us_median"] > 0
    assert rows[1]["ratio"] == rows[1]["us_median"] / rows[0]["us_median"]


@pytest.mark.parametrize("kind", ["ours", "dense"])
def test_a_step_changes_every_weight(tmp_path: Path, kind: str) -> None:
    one = contender(tmp_path, kind)
    assert one.prepare({"tokens": 64, "codes": "uniform"})["verified"] is True
    before = {name: p.detach().clone() for name, p in one.layer.named_parameters()}
    one.run(one.draw())
    for name, parameter in one.layer.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_a_wrong_gradient_is_refused(tmp_path: Path) -> None:
    one = contender(tmp_path, "dense")
    weight = next(one.layer.parameters())
    # The float64 copy that is compared with does not inherit the hook.
    weight.register_hook(lambda gradient: gradient.roll(1, 0) if gradient.dtype == torch.float32 else None)
    found = one.prepare({"tokens": 64, "codes": "uniform"})
    assert found["verified"] is False
    assert found["error"].startswith("gradient of 0.weight does not match the reference")


def test_gradients_by_hand() -> None:
    layer = torch.nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(3.0)
        layer.bias.fill_(1.0)
    found = gradients(layer, torch.tensor([[2.0], [5.0]]), torch.tensor([[1.0], [10.0]]))
    # y = 3 x + 1; dx = 3 g; dw = 2*1 + 5*10; db = 11.
    assert found["output"].flatten().tolist() == [7.0, 16.0]
    assert found["input"].flatten().tolist() == [3.0, 30.0]
    assert found["weight"].item() == 52.0
    assert found["bias"].item() == 11.0
    assert layer.weight.grad is None


def test_skewed_tokens_crowd_around_few_centres() -> None:
    tokens = skewed_tokens(2000, 32, seed=0)
    codes = (tokens[:, :8] > 0).int().mul(2 ** torch.arange(8)).sum(1)
    uniform = (torch.randn(2000, 32)[:, :8] > 0).int().mul(2 ** torch.arange(8)).sum(1)
    assert torch.bincount(codes).max() > 5 * torch.bincount(uniform).max()


def test_unknown_codes_are_named() -> None:
    with pytest.raises(ConfigError, match="--codes must be uniform, skewed or both, got trained"):
        run_train_step(TrainStepArgs(**TINY, codes=("trained",)))
