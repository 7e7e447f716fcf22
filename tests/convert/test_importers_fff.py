"""The reference's FFF with leaves, transcribed naively in float64, against the imported layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nogemm


def reference_state(depth: int, d_in: int, width: int, d_out: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(depth)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = 2**depth
    return {
        "depth": torch.tensor(depth),
        "node_weights": draw(leaves - 1, d_in),
        "node_biases": draw(leaves - 1, 1),
        "w1s": draw(leaves, d_in, width),
        "b1s": draw(leaves, width),
        "w2s": draw(leaves, width, d_out),
        "b2s": draw(leaves, d_out),
    }


def naive(state: dict[str, Tensor], token: Tensor, leaf_bias: bool) -> Tensor:
    node, leaves = 0, len(state["w1s"])
    while node < leaves - 1:
        z = float(token @ state["node_weights"][node] + state["node_biases"][node, 0])
        node = 2 * node + (2 if z >= 0 else 1)
    leaf = node - (leaves - 1)
    hidden = torch.clamp(token @ state["w1s"][leaf] + state["b1s"][leaf], min=0.0)
    return hidden @ state["w2s"][leaf] + (state["b2s"][leaf] if leaf_bias else 0.0)


@pytest.mark.parametrize("leaf_bias", [True, False])
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (1, 6, 1, 6), (4, 8, 3, 2)], ids=str)
def test_outputs_equal_the_references_evaluation(shape: tuple[int, int, int, int], leaf_bias: bool) -> None:
    state = reference_state(*shape)
    layer = nogemm.importers.fastfeedforward(state, leaf_bias=leaf_bias).eval()
    x = torch.randn(20, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), torch.stack([naive(state, token, leaf_bias) for token in x]))
    wrong = torch.stack([naive(state, token, not leaf_bias) for token in x])
    assert not torch.allclose(layer(x), wrong), "the comparison can fail"


def test_usage_counters_are_left_out() -> None:
    state = reference_state(2, 4, 3, 4) | {"node_usage": torch.zeros(3), "leaf_usage": torch.zeros(4)}
    assert nogemm.importers.fastfeedforward(state).fitted == "exact"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("w2s", None, "missing: w2s"),
        ("tables", torch.zeros(1), "unknown: tables"),
        ("w1s", torch.zeros(4, 4, 9), r"w2s has shape \[4, 3, 4\], expected \[4, 9, \*\]"),
        ("node_biases", torch.zeros(3), r"node_biases has shape \[3\]"),
        ("depth", torch.tensor(3), r"w1s has shape \[4, 4, 3\], expected \[8"),
        ("depth", torch.tensor(2.0), "depth must be one integer"),
    ],
)
def test_another_checkpoint_is_refused_by_name(key: str, value: Tensor | None, words: str) -> None:
    state = reference_state(2, 4, 3, 4)
    if value is None:
        del state[key]
    else:
        state[key] = value
    with pytest.raises(nogemm.CheckpointError, match=words):
        nogemm.importers.fastfeedforward(state)
