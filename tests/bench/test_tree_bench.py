"""Benches of TreeFFN: the dense-masked opponent is the same function, and both benches know the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nogemm
from nogemm.bench.contenders.masked_tree import MaskedTree
from nogemm.bench.layer import LayerBenchArgs, run_layer_bench
from nogemm.bench.train_step import TrainStepArgs, run_train_step
from nogemm.errors import ConfigError

SMALL: dict[str, Any] = {"set": ("trees=2", "depth=3"), "threads": 1, "rounds": 2}


def test_the_masked_form_is_the_layer() -> None:
    layer = nogemm.TreeConfig(trees=3, depth=4).build(12, 7).double().eval()
    masked = MaskedTree(layer)
    x = torch.randn(50, 12, dtype=torch.float64)
    torch.testing.assert_close(masked(x), layer(x))
    assert sum(p.numel() for p in masked.parameters()) == layer.cost(1).parameters
    with torch.no_grad():
        masked.up[0] *= -1.0
    assert not torch.allclose(masked(x), layer(x))


def test_the_masked_form_knows_the_published_layer_alone() -> None:
    with pytest.raises(ConfigError, match="only the published form"):
        MaskedTree(nogemm.TreeConfig(depth=2, core=3).build(8))


@pytest.mark.slow
def test_layer_rows_are_verified_and_rated() -> None:
    args = LayerBenchArgs(
        method="tree", d=32, hidden=63, dtype="int8,bf16,fp32", batch=(1, 16), against=("torch-fp32",),
        seconds=0.01, pool_cap_bytes=1 << 20, **SMALL,
    )  # fmt: skip
    rows = run_layer_bench(args)["rows"]
    assert len(rows) == 4 * 2
    for row in rows:
        assert row["verified"] is True, row
        assert row["us_median"] > 0
    bytes_read = {row["contender"]: row["bytes_read"] for row in rows if row["batch"] == 1}
    assert bytes_read["nogemm-bf16"] == bytes_read["nogemm-fp32"] / 2


@pytest.mark.slow
def test_training_steps_of_all_forms_are_verified() -> None:
    result = run_train_step(TrainStepArgs(method="tree", d=16, tokens=64, **SMALL))
    names = ("nogemm", "nogemm-rows", "masked-fused", "masked-foreach")
    assert [row["contender"] for row in result["rows"]] == [*names, *names]
    for row in result["rows"]:
        assert row["verified"] is True, row
        assert row["us_median"] > 0


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="--method must be one of lookup, tree, hire"):
        run_train_step(TrainStepArgs(method="no"))
