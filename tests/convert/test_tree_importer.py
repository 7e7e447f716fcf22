"""UltraFastBERT's dense-masked layer, transcribed naively in float64, against the imported layer."""

import math
import re

import pytest
import torch
from torch import Tensor

import nogemm
from nogemm.layers import TreeFFN
from nogemm.testing.compare_tree import check_tree

State = dict[str, Tensor]


def reference_state(d: int, trees: int, depth: int, d_out: int) -> State:
    neurons = trees * (2 ** (depth + 1) - 1)
    return {
        "linear_in.weight": torch.randn(neurons, d, dtype=torch.float64) / math.sqrt(d),
        "linear_in.bias": torch.randn(neurons, dtype=torch.float64) / 3,
        "linear_out.weight": torch.randn(d_out, neurons, dtype=torch.float64),
    }


def reference(state: State, trees: int, x: list[float]) -> list[float]:
    """All neurons, then the ones on the way of each tree, one by one."""
    z = (state["linear_in.weight"] @ torch.tensor(x, dtype=torch.float64) + state["linear_in.bias"]).tolist()
    nodes = len(z) // trees
    y = torch.zeros(state["linear_out.weight"].shape[0], dtype=torch.float64)
    for tree in range(trees):
        node = 0
        while node < nodes:
            logit = z[tree * nodes + node]
            fired = 0.5 * logit * (1 + math.erf(logit / math.sqrt(2)))
            y += fired * state["linear_out.weight"][:, tree * nodes + node]
            node = 2 * node + (2 if logit > 0 else 1)
    return y.tolist()


@pytest.mark.parametrize(("d", "trees", "depth", "d_out"), [(16, 1, 5, 16), (12, 4, 2, 7), (8, 6, 0, 8)])
def test_imported_layers_answer_as_the_reference(d: int, trees: int, depth: int, d_out: int) -> None:
    state = reference_state(d, trees, depth, d_out)
    layer = nogemm.importers.ultrafastbert(state, trees=trees).eval()
    assert isinstance(layer, TreeFFN)
    assert (layer.config.trees, layer.config.depth, layer.fitted) == (trees, depth, "exact")
    x = torch.randn(30, d, dtype=torch.float64)
    expected = torch.tensor([reference(state, trees, row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)
    plain = layer.float()
    check_tree("packed", plain, plain.pack("fp32")(x.float()), x.float())


def test_wrong_neighbours_would_be_noticed() -> None:
    state = reference_state(16, 1, 5, 16)
    x = torch.randn(30, 16, dtype=torch.float64)
    right = nogemm.importers.ultrafastbert(state, trees=1)(x)
    state["linear_out.weight"] = state["linear_out.weight"].roll(1, dims=1)
    assert not torch.allclose(nogemm.importers.ultrafastbert(state, trees=1)(x), right)


def test_every_wrong_key_and_shape_is_named() -> None:
    good = reference_state(16, 2, 3, 8)
    cases: list[tuple[State, int, str]] = [
        ({k: v for k, v in good.items() if k != "linear_in.bias"}, 2, "missing: linear_in.bias"),
        ({**good, "linear_out.bias": torch.zeros(8)}, 2, "unknown: linear_out.bias"),
        ({**good, "linear_in.bias": torch.zeros(29)}, 2, "linear_in.bias has shape [29], expected [30]"),
        ({**good, "linear_out.weight": torch.zeros(8, 31)}, 2, "linear_out.weight has shape [8, 31], expected [*, 30]"),
        (good, 3, "has 30 neurons, which are not trees=3 trees"),
        (good, 0, "not trees=0 trees"),
        (
            {"tables": torch.zeros(3)},
            1,
            "missing: linear_in.weight, linear_in.bias, linear_out.weight; unknown: tables",
        ),
    ]
    for state, trees, words in cases:
        with pytest.raises(nogemm.CheckpointError, match=re.escape(words)):
            nogemm.importers.ultrafastbert(state, trees=trees)
    with pytest.raises(nogemm.ConfigError, match="activation must be one of"):
        nogemm.importers.ultrafastbert(good, trees=2, activation="tanh")  # type: ignore[arg-type]
