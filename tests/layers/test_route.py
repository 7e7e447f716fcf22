"""Every layer says which rows it reads: its answer is their weighted sum, and the packed twin reads the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import nogemm
from nogemm.config import LayerConfig
from nogemm.errors import ConfigError
from nogemm.layers import FFN
from nogemm.projections import BHConfig

D, HIDDEN, TOKENS = 24, 40, 60
ROUTED: dict[str, LayerConfig] = {
    "lookup": nogemm.LookupConfig(tables=6, bits=4, neighbours=2, projection=BHConfig(block=8)),
    "tree": nogemm.TreeConfig(trees=2, depth=3),
    "leaf_tree": nogemm.LeafTreeConfig(depth=2, leaf_width=3),
    "hire": nogemm.HireConfig(keep=0.2),
    "switch": nogemm.SwitchConfig(experts=3),
    "slide": nogemm.SlideConfig(bits=3, tables=2),
    "mongoose": nogemm.MongooseConfig(bits=3, tables=2),
    "yoso": nogemm.YosoConfig(hashes=5, bits=3),
    "dense": nogemm.DenseConfig(),
}


def build(config: LayerConfig) -> FFN:
    return config.build(D, hidden=HIDDEN).eval().requires_grad_(False)


def stored(layer: FFN) -> Tensor:
    """Return the rows of the layers whose answer is the sum of weighted rows and a bias."""
    kind = layer.config.kind
    if kind == "lookup":
        return layer.get_parameter("tables").flatten(0, 1)
    if kind == "tree":
        return layer.get_parameter("weight_out").flatten(0, 1)
    if kind == "hire":
        return layer.get_parameter("down")
    if kind == "dense":
        return layer.get_parameter("down.weight").T
    return layer.get_parameter("neurons.down.weight").T


@pytest.mark.parametrize("kind", ["lookup", "tree", "hire", "dense", "slide", "mongoose"])
def test_the_answer_is_the_weighted_sum_of_the_rows(kind: str) -> None:
    layer, x = build(ROUTED[kind]).double(), torch.randn(TOKENS, D, dtype=torch.float64)
    route = layer.route(x)
    assert route.weights is not None
    sums = torch.einsum("np,npd->nd", route.weights, stored(layer)[route.rows.clamp_min(0).long()])
    assert (route.weights[route.rows < 0] == 0).all()
    bias = layer(x) - sums
    torch.testing.assert_close(bias, bias[:1].expand_as(bias), rtol=0, atol=1e-9)
    wrong = torch.einsum("np,npd->nd", route.weights, stored(layer)[route.rows.roll(1, 1).clamp_min(0).long()])
    assert float((layer(x) - wrong).var(0).sum()) > 1e-6


@pytest.mark.parametrize("kind", [kind for kind in ROUTED if kind != "dense"])
def test_the_packed_twin_reads_the_same_rows(isa: str, kind: str) -> None:
    layer, x = build(ROUTED[kind]), torch.randn(2, TOKENS // 2, D)
    ours, theirs = layer.route(x).rows, layer.pack("fp32").route(x).rows
    assert ours.shape == theirs.shape
    assert float((ours.sort(1).values != theirs.sort(1).values).any(1).double().mean()) <= 1 / TOKENS


@pytest.mark.parametrize("config", [nogemm.NoConfig(), nogemm.ShuffleConfig(block=8)])
def test_a_layer_that_reads_everything_says_so(config: LayerConfig) -> None:
    layer = build(config)
    for routed in (layer, layer.pack("fp32")):
        with pytest.raises(ConfigError, match="nothing to route"):
            routed.route(torch.randn(3, D))


def test_no_token_reads_nothing() -> None:
    for config in ROUTED.values():
        assert build(config).route(torch.zeros(0, D)).rows.shape[0] == 0
