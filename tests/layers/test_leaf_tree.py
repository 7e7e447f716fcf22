"""LeafTreeFFN: the equations, training against evaluation, losses, usage, fitting, packing, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import nogemm
from nogemm.errors import ConfigError
from nogemm.layers import DenseConfig, LeafTreeConfig, LeafTreeFFN
from nogemm.layers.leaf_tree.layer import hardening_loss, leaf_balance_loss, leaf_probabilities
from nogemm.layers.leaf_tree.packed import PackedLeafTree
from nogemm.testing.compare import check_equal
from nogemm.testing.compare_model import answer_to, check_same_model

SHAPES = [(0, 3, 5, 7, 0), (1, 1, 4, 4, 0), (3, 8, 16, 16, 0), (4, 2, 9, 6, 3)]


def build(depth: int, width: int, d_in: int, d_out: int, master: int, **fields) -> LeafTreeFFN:
    layer = LeafTreeConfig(depth=depth, leaf_width=width, master=master, **fields).build(d_in, d_out)
    for parameter in layer.parameters():
        if not parameter.any():  # biases start at zero: make every parameter matter
            torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval()


def activate(z: float, kind: str) -> float:
    if kind == "relu":
        return max(z, 0.0)
    return z / (1 + math.exp(-z)) if kind == "silu" else 0.5 * z * math.erfc(-z / math.sqrt(2))


@torch.no_grad()
def naive_leaf(layer: LeafTreeFFN, leaf: int, v: torch.Tensor) -> torch.Tensor:
    y = layer.leaf_out_bias[leaf].clone()
    for w in range(layer.config.leaf_width):
        z = float(layer.leaf_in[leaf, w] @ v + layer.leaf_in_bias[leaf, w])
        y += activate(z, layer.activation) * layer.leaf_out[leaf, w]
    return y


@torch.no_grad()
def naive(layer: LeafTreeFFN, v: torch.Tensor, soft: bool) -> torch.Tensor:
    """Compute one token straight from the equations, sharing no code with the layer."""
    leaves, depth = 2**layer.config.depth, layer.config.depth
    y = torch.zeros(layer.d_out, dtype=v.dtype)
    for leaf in range(leaves):
        share, i = 1.0, 0
        for level in range(depth):
            z = float(layer.node[i] @ v + layer.node_bias[i])
            right = leaf >> (depth - 1 - level) & 1
            c = 1 / (1 + math.exp(-z)) if soft else float(z > 0)
            share *= c if right else 1 - c
            i = 2 * i + 1 + right
        y += share * naive_leaf(layer, leaf, v)
    if layer.config.master:
        assert layer.master_in is not None
        assert layer.master_out is not None
        assert layer.master_gate is not None
        assert layer.master_in_bias is not None
        assert layer.master_out_bias is not None
        master = layer.master_out_bias.clone()
        for w in range(layer.config.master):
            z = float(layer.master_in[w] @ v + layer.master_in_bias[w])
            master += activate(z, layer.activation) * layer.master_out[w]
        s = 1 / (1 + math.exp(-float(layer.master_gate)))
        y = s * y + (1 - s) * master
    return y


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equations(shape: tuple[int, int, int, int, int], activation: str) -> None:
    layer = build(*shape, activation=activation).double()
    x = torch.randn(6, shape[2], dtype=torch.float64)
    for soft in (False, True):
        expected = torch.stack([naive(layer, v, soft) for v in x])
        torch.testing.assert_close(layer.train(soft)(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hard_training_equals_evaluation(shape: tuple[int, int, int, int, int]) -> None:
    x = torch.randn(50, shape[2], dtype=torch.float64)
    for routing in ("hard", "straight_through"):
        layer = build(*shape, routing=routing).double()
        torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_soft_training_becomes_evaluation_as_decisions_harden() -> None:
    layer = build(3, 4, 8, 8, 0).double()
    x = torch.randn(40, 8, dtype=torch.float64)
    far = (layer.train()(x) - layer.eval()(x)).norm()
    with torch.no_grad():
        layer.node.mul_(1e4)
        layer.node_bias.mul_(1e4)
    near = (layer.train()(x) - layer.eval()(x)).norm()
    assert near < 1e-2 * far


def test_a_tie_goes_left_in_both_modes() -> None:
    layer = build(1, 1, 2, 2, 0, routing="hard")
    with torch.no_grad():
        layer.node.zero_()
        layer.node_bias.zero_()
    x = torch.randn(3, 2)
    assert layer.leaves(x).tolist() == [0, 0, 0]
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


def test_gradients() -> None:
    layer = build(2, 3, 4, 5, 2, harden=0.0).double().train()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: layer(v), (x,))


def test_only_straight_through_moves_nodes_of_hard_decisions() -> None:
    x = torch.randn(20, 6)
    for routing, moves in (("hard", False), ("straight_through", True)):
        layer = build(2, 3, 6, 6, 0, routing=routing, harden=0.0).train()
        layer(x).square().sum().backward()
        assert (layer.node.grad is not None and bool(layer.node.grad.any())) == moves, routing


def test_probabilities_sum_to_one_and_follow_the_bits() -> None:
    c = torch.tensor([[0.25, 0.5, 0.9]])
    torch.testing.assert_close(leaf_probabilities(c), torch.tensor([[0.375, 0.375, 0.025, 0.225]]))
    assert leaf_probabilities(torch.empty(2, 0)).tolist() == [[1.0], [1.0]]


def test_losses_at_their_ends() -> None:
    assert float(hardening_loss(torch.full((4, 3), 0.5))) == pytest.approx(math.log(2))
    assert float(hardening_loss(torch.tensor([[0.0, 1.0]]))) < 1e-4
    even = torch.eye(4)
    assert float(leaf_balance_loss(even)) == pytest.approx(1.0)
    assert float(leaf_balance_loss(even[:1].expand(4, -1))) == pytest.approx(4.0)


@pytest.mark.parametrize(("field", "weight"), [("harden", 0.5), ("balance", 0.5)])
def test_losses_reach_the_nodes_through_any_trainer(field: str, weight: float) -> None:
    fields = {"harden": 0.0, "balance": 0.0}
    plain, helped = build(2, 3, 6, 6, 0, **fields), build(2, 3, 6, 6, 0, **(fields | {field: weight}))
    helped.load_state_dict(plain.state_dict())
    x = torch.randn(30, 6)
    grads = []
    for layer in (plain, helped):
        layer.train()(x).square().mean().backward()
        assert layer.node.grad is not None
        grads.append(layer.node.grad.clone())
    c = torch.sigmoid(torch.nn.functional.linear(x, plain.node, plain.node_bias))
    loss = hardening_loss(c) if field == "harden" else leaf_balance_loss(leaf_probabilities(c))
    (extra,) = torch.autograd.grad(weight * loss, plain.node)
    torch.testing.assert_close(grads[1], grads[0] + extra)


def test_leak_swaps_children_in_training_only() -> None:
    layer = build(1, 2, 4, 4, 0, leak=1.0)
    x = torch.randn(10, 4)
    swapped = build(1, 2, 4, 4, 0)
    swapped.load_state_dict(layer.state_dict())
    with torch.no_grad():
        swapped.node.neg_()
        swapped.node_bias.neg_()
    torch.testing.assert_close(layer.train()(x), swapped.train()(x))
    assert torch.equal(layer.eval().leaves(x), 1 - swapped.eval().leaves(x))


def test_usage_counts_true_ways() -> None:
    layer = build(3, 2, 5, 5, 0)
    nodes, leaves = layer.usage(torch.randn(4, 25, 5))
    assert leaves.sum() == 100
    assert nodes[0] == 100
    for i in range(3):
        assert nodes[i] == nodes[2 * i + 1] + nodes[2 * i + 2]
    assert nodes[3:].tolist() == leaves.view(-1, 2).sum(1).tolist()
    only = LeafTreeConfig(depth=0).build(5)
    assert [u.tolist() for u in only.usage(torch.randn(7, 5))] == [[], [7]]


def test_cost() -> None:
    layer = LeafTreeConfig(depth=3, leaf_width=8, master=2).build(10, 6)
    one = layer.cost(1)
    assert one.flops == 2 * (3 * 10 + 10 * 16)
    assert one.parameters == sum(p.numel() for p in layer.parameters())
    assert one.bytes_read == 4 * (3 * 11 + 8 * 17 + 6 + 2 * 17 + 6 + 1)
    assert layer.cost(0).bytes_read == 0
    assert layer.cost(10**6).bytes_read == pytest.approx(4 * one.parameters)


def test_initial_scale_is_independent_of_the_shape() -> None:
    for depth, width in ((0, 64), (3, 8), (6, 2)):
        layer = LeafTreeConfig(depth=depth, leaf_width=width).build(128).eval()
        assert float(layer(torch.randn(3000, 128)).detach().std()) == pytest.approx(0.14, rel=0.15)


def test_a_leaf_wide_enough_is_fitted_exactly() -> None:
    dense = DenseConfig(hidden=12).build(8)
    layer = LeafTreeConfig(depth=2, leaf_width=12).build(8).eval()
    x = torch.randn(200, 8)
    assert layer.fit_activations(dense, x) == "closed-form"
    torch.testing.assert_close(layer(x), dense(x))
    counts = layer.usage(x)[1]
    assert int(counts.min()) >= 30, "the halves are even"


def test_fitting_beats_one_leaf_and_handles_a_gated_layer() -> None:
    dense = DenseConfig(hidden=32).build(8)
    x = torch.randn(600, 8)
    errors = []
    for depth in (0, 3):
        layer = LeafTreeConfig(depth=depth, leaf_width=4).build(8).eval()
        layer.fit_activations(dense, x)
        errors.append(float((layer(x) - dense(x)).square().mean()))
    assert errors[1] < 0.8 * errors[0]
    gated = DenseConfig(hidden=32).build(8, activation="silu", gated=True)
    layer = LeafTreeConfig(depth=2, leaf_width=4, master=3).build(8).eval()
    layer.fit_activations(gated, x)
    assert float((layer(x) - gated(x)).square().mean()) < float(gated(x).var(0).mean()) * 1.01


def test_fitting_one_token_and_none() -> None:
    dense = DenseConfig(hidden=8).build(4)
    layer = LeafTreeConfig(depth=2, leaf_width=2).build(4)
    assert layer.fit_activations(dense, torch.randn(0, 4)) == "random"
    assert layer.fit_activations(dense, torch.randn(1, 4)) == "closed-form"
    assert torch.isfinite(layer.eval()(torch.randn(3, 4))).all()


@pytest.mark.parametrize("path", ["rows", "dense"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed(shape: tuple[int, int, int, int, int], dtype: str, path: str) -> None:
    layer = build(*shape)
    packed = nogemm.pack(layer, dtype=dtype, path=path)
    x = torch.randn(7, 5, shape[2])
    if dtype == "fp32":
        torch.testing.assert_close(packed(x), layer(x))
        return
    with torch.no_grad():  # nodes are rounded: compare where the way is the same
        rounded = layer.node.bfloat16().float()
        twin = build(*shape)
        twin.load_state_dict(layer.state_dict())
        twin.node.copy_(rounded)
    error = (packed(x) - twin(x)).norm() / twin(x).norm()
    assert 0 < float(error) < (0.01 if dtype == "bf16" else 0.03)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_packed_reads_named_rows_in_one_call_and_sorts_large_batches(
    isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = build(3, 5, 40, 24, 3).pack(dtype)
    assert isinstance(packed, PackedLeafTree)
    named: list[int] = []
    plain = type(packed.neurons).named
    monkeypatch.setattr(
        type(packed.neurons), "named", lambda self, x, mask: named.append(len(x)) or plain(self, x, mask)
    )
    packed.fix_path("auto")
    assert 1 < packed.sorted_from < 20_000
    x = torch.randn(packed.sorted_from, 40)
    few, many = packed(x[:-1]), packed(x)
    assert named == [len(x) - 1]
    torch.testing.assert_close(many[:-1], few, rtol=1e-4, atol=1e-4)
    packed.fix_path("rows")
    torch.set_num_threads(1)
    one = packed(x)
    torch.set_num_threads(2)
    check_equal("two threads", packed(x), one)
    check_equal("one by one", torch.cat([packed(row) for row in x[:20].split(1)]), one[:20])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_token_that_is_not_finite_spoils_itself_alone(bad: float) -> None:
    for depth in (0, 3):
        layer = build(depth, 4, 8, 8, 0, activation="relu")
        x = torch.randn(6, 8)
        clean = x.clone()
        x[2, 3] = bad
        for run in (layer, layer.pack(path="rows"), layer.pack(path="dense")):
            y = run(x)
            assert y[2].isnan().all()
            keep = [0, 1, 3, 4, 5]
            torch.testing.assert_close(y[keep], run(clean)[keep])


def test_all_tokens_in_one_leaf_and_no_token() -> None:
    layer = build(3, 4, 8, 8, 0)
    with torch.no_grad():
        layer.node_bias.fill_(1e6)
    assert set(layer.leaves(torch.randn(9, 8)).tolist()) == {7}
    for run in (layer, layer.pack(path="rows"), layer.pack(path="dense")):
        assert run(torch.randn(0, 8)).shape == (0, 8)
        assert run(torch.randn(9, 8)).shape == (9, 8)


def test_config_round_trip_and_state_dict() -> None:
    config = LeafTreeConfig(depth=2, leaf_width=3, master=1, leak=0.1)
    assert nogemm.layer_config(config.to_dict()) == config
    one, other = build(2, 3, 4, 4, 1), build(2, 3, 4, 4, 1)
    other.load_state_dict(one.state_dict())
    x = torch.randn(5, 4)
    check_same_model("loaded", other, one, answer_to(x))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"depth": -1}, "depth"),
        ({"depth": 17}, "depth"),
        ({"leaf_width": 0}, "leaf_width"),
        ({"leak": 1.5}, "leak"),
        ({"harden": -1}, "harden"),
        ({"routing": "top2"}, "routing"),
        ({"activation": "tanh"}, "activation"),
    ],
)
def test_bad_config(fields: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LeafTreeConfig(**fields)
