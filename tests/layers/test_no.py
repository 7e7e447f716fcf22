"""No layer: a constant answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nogemm


def test_no_ffn_answers_with_the_mean() -> None:
    source, x = nogemm.DenseConfig().build(16, hidden=64), torch.randn(200, 16)
    layer = nogemm.NoConfig().build(16)
    assert not layer(x).any()
    assert layer.fit_activations(source, x) == "closed-form"
    torch.testing.assert_close(layer(x)[0], source(x).mean(0))
    assert layer.cost(5).flops == 0


@pytest.mark.parametrize("packed", [False, True])
def test_no_ffn_traced_on_three_tokens_answers_five(packed: bool) -> None:
    layer = nogemm.NoConfig().build(16).eval()
    with torch.no_grad():
        layer.bias.normal_()
        traced: Any = torch.jit.trace(layer.pack("fp32") if packed else layer, torch.randn(3, 16))
        assert torch.equal(traced(torch.randn(5, 16)), layer.bias.expand(5, 16))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_what_rounding_says_is_what_packing_does(dtype: str) -> None:
    """A sum with a tree is held against its rounded copy to the last digits."""
    layer = nogemm.SumConfig(terms=(nogemm.TreeConfig(depth=0), nogemm.NoConfig())).build(3, 8).eval()
    torch.nn.init.normal_(layer.get_parameter("terms.1.bias"))
    x = torch.randn(5, 3)
    torch.testing.assert_close(layer.pack(dtype)(x), layer.rounded(dtype)(x), rtol=1e-5, atol=1e-6)
