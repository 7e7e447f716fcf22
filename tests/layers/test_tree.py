"""TreeFFN: the equations, the paper's costs, options of training, statistics, fitting, bad input."""

import math
from typing import Any

import pytest
import torch

import nogemm
from nogemm.errors import ConfigError, ShapeError
from nogemm.layers import DenseFFN, TreeFFN
from nogemm.layers.tree.routing import balance_loss
from nogemm.testing.cases import TREE_CASES, TreeCase
from nogemm.testing.compare_model import answer_to, check_same_model

by_name = pytest.mark.parametrize("case", TREE_CASES, ids=lambda c: c.name)


def build(case: TreeCase) -> TreeFFN:
    layer = case.config.build(case.d_model, case.d_out)
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if name != "steps" and not tensor.any():  # biases start at zero: make every parameter matter
            torch.nn.init.normal_(tensor, std=0.3)
    return layer.eval()


def activate(z: float, kind: str) -> float:
    if kind == "relu":
        return max(z, 0.0)
    return z / (1 + math.exp(-z)) if kind == "silu" else 0.5 * z * math.erfc(-z / math.sqrt(2))


@torch.no_grad()
def naive(layer: TreeFFN, x: list[float]) -> list[float]:
    """Compute one token by loops straight from the equations, sharing no code with the layer."""
    v = torch.tensor(x, dtype=torch.float64)
    y = torch.zeros(layer.d_out, dtype=torch.float64) if layer.bias is None else layer.bias.double().clone()
    for k in range(layer.config.trees):
        i = 0
        for _ in range(layer.config.depth + 1):
            z = float(layer.weight_in[k, i].double() @ v)
            z += 0.0 if layer.bias_in is None else float(layer.bias_in[k, i])
            y += activate(z, layer.activation) * layer.weight_out[k, i].double()
            i = 2 * i + 1 + int(z > (0.0 if layer.threshold is None else float(layer.threshold[k, i])))
    for j in range(layer.config.core):
        assert layer.core_in is not None
        assert layer.core_out is not None
        z = float(layer.core_in[j].double() @ v) + (0.0 if layer.core_in_bias is None else float(layer.core_in_bias[j]))
        y += activate(z, layer.activation) * layer.core_out[j].double()
    return y.tolist()


@by_name
def test_equations(case: TreeCase) -> None:
    layer = build(case).double()
    x = torch.randn(5, case.d_model, dtype=torch.float64)
    expected = torch.tensor([naive(layer, row) for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def masked_dense(layer: TreeFFN, x_ND: torch.Tensor) -> torch.Tensor:
    """The published training form: all neurons, and a mask of those on the way."""
    config, nodes = layer.config, layer.weight_in.shape[1]
    assert layer.bias_in is not None
    z = x_ND @ layer.weight_in.flatten(0, 1).T + layer.bias_in.flatten()
    mask = torch.zeros_like(z)
    for k in range(config.trees):
        at = torch.zeros(len(x_ND), dtype=torch.int64)
        for _ in range(config.depth + 1):
            column = (k * nodes + at).unsqueeze(1)
            mask.scatter_(1, column, 1.0)
            at = 2 * at + 1 + (z.gather(1, column).squeeze(1) > 0).long()
    return (mask * torch.nn.functional.gelu(z)) @ layer.weight_out.flatten(0, 1)


def test_training_form_is_the_masked_dense_layer_with_its_gradients() -> None:
    layer = nogemm.TreeConfig(trees=3, depth=4, out_bias=False).build(12, 7).double().train()
    x = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    found = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad(masked_dense(layer, x).square().sum(), [x, *layer.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("trees", "depth", "neurons", "used", "mmac"),
    [(3072, 0, 3072, 3072, 4.72), (512, 2, 3584, 1536, 2.36), (128, 4, 3968, 640, 0.98), (1, 11, 4095, 12, 0.018)],
)
def test_cost_gives_the_papers_counts(trees: int, depth: int, neurons: int, used: int, mmac: float) -> None:
    with torch.device("meta"):
        layer = nogemm.TreeConfig(trees=trees, depth=depth, out_bias=False).build(768)
    assert layer.weight_in.shape[:2].numel() == neurons
    assert layer.cost(1).flops == 2 * used * 2 * 768
    assert round(layer.cost(1).flops / 2e6, 3 if mmac < 0.1 else 2) == mmac
    assert layer.cost(1).parameters == neurons * (2 * 768 + 1)
    assert layer.cost(1).bytes_read == 4 * used * (2 * 768 + 1)


def test_cost_counts_distinct_nodes_and_the_core() -> None:
    layer = nogemm.TreeConfig(trees=2, depth=2, core=3).build(10, 6)
    stored = sum(p.numel() for p in layer.parameters())
    assert layer.cost(5).parameters == stored
    nodes = 2 * (1 + 2 * (1 - 0.5**5) + 4 * (1 - 0.75**5))
    assert layer.cost(5).bytes_read == pytest.approx(4 * (nodes * 17 + 3 * 17 + 6))
    assert layer.cost(5).flops == 5 * 2 * (2 * 3 + 3) * 16
    assert layer.cost(0).flops == layer.cost(0).bytes_read == 0


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu"])
@pytest.mark.parametrize(("trees", "depth", "core"), [(1, 11, 0), (16, 3, 8), (64, 0, 0)])
def test_initial_scale_is_independent_of_the_shape(activation: Any, trees: int, depth: int, core: int) -> None:
    layer = nogemm.TreeConfig(trees=trees, depth=depth, core=core, activation=activation).build(256)
    assert float(layer(torch.randn(2000, 256)).std()) == pytest.approx(0.14, rel=0.1)


@by_name
def test_training_and_evaluation_agree_unless_annealing(case: TreeCase) -> None:
    layer = build(case)
    x = torch.randn(30, case.d_model)
    y = layer(x)
    if case.config.routing == "anneal":
        layer.get_buffer("steps").fill_(case.config.anneal_steps)  # annealed: every step counts fully
    torch.testing.assert_close(layer.train()(x), y)


def test_annealing_hardens() -> None:
    layer = nogemm.TreeConfig(depth=3, routing="anneal", anneal_steps=2).build(8).train()
    x = torch.randn(20, 8)
    hard = layer.eval()(x)
    first, second, third = (layer.train()(x) for _ in range(3))
    distance = [float((y - hard).detach().norm()) for y in (first, second, third)]
    assert distance[0] > distance[1] > distance[2] == 0.0


@pytest.mark.parametrize("routing", ["straight_through", "anneal"])
def test_directions_learn_from_what_lies_below(routing: Any) -> None:
    torch.manual_seed(1)
    layer = nogemm.TreeConfig(depth=1, branch="bias", routing=routing, out_bias=False).build(3).double().train()
    with torch.no_grad():  # the root does not fire: whatever reaches its threshold came through the step
        layer.weight_out[0, 0] = 0.0
    layer(torch.randn(50, 3, dtype=torch.float64)).sum().backward()
    assert isinstance(layer.threshold, torch.nn.Parameter)
    assert layer.threshold.grad is not None
    assert float(layer.threshold.grad[0, 0].abs()) > 0.0
    hard = nogemm.TreeConfig(depth=1, branch="bias", out_bias=False).build(3).double().train()
    hard(torch.randn(50, 3, dtype=torch.float64)).sum().backward()
    assert isinstance(hard.threshold, torch.nn.Parameter)
    assert hard.threshold.grad is None


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_balancing_evens_the_halves(balance: Any) -> None:
    config = nogemm.TreeConfig(depth=3, branch="bias", balance=balance, balance_rate=0.3)
    layer = config.build(6)
    assert layer.bias_in is not None
    with torch.no_grad():
        layer.bias_in.add_(1.0)
    x = torch.randn(512, 6)
    before = layer.path_statistics(x)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1.0)
    for _ in range(40):
        optimiser.zero_grad()
        (layer.train()(x) * 0.0).sum().backward()  # nothing else is learnt
        optimiser.step()
    after = layer.path_statistics(x)
    assert before.left_fraction < 0.3
    assert after.left_fraction == pytest.approx(0.5, abs=0.06)
    assert after.balance > before.balance


def test_balance_loss_is_one_if_even_and_two_if_lost() -> None:
    index = torch.zeros(4, 1, 2, dtype=torch.int64)
    even = torch.tensor([100.0, 100.0, -100.0, -100.0]).view(4, 1, 1).expand(4, 1, 2)
    assert float(balance_loss(even, index, 3, 1.0)) == pytest.approx(1.0)
    assert float(balance_loss(even.abs(), index, 3, 1.0)) == pytest.approx(2.0)


def test_statistics_worked_by_hand() -> None:
    layer = nogemm.TreeConfig(depth=2, bias=False, out_bias=False, activation="relu").build(2)
    with torch.no_grad():
        layer.weight_in.copy_(torch.tensor([[[1.0, 0.0]] + [[0.0, 1.0]] * 6]))
    found = layer.path_statistics(torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]]))
    assert found.visits.tolist() == [[4, 1, 3, 1, 0, 1, 2]]
    assert (found.tokens, found.dead_nodes, found.left_fraction) == (4, 1, 3 / 8)
    assert found.dead_share == pytest.approx(1 / 7)
    assert found.balance == pytest.approx(1.5 * math.log(2) / math.log(4))  # leaves 1/4, 0, 1/4, 1/2
    assert found.firing == pytest.approx((3 + 1 + 3 + 0) / 4)
    empty = layer.path_statistics(torch.zeros(0, 2))
    assert (empty.dead_nodes, empty.left_fraction) == (7, 0.5)


def test_all_tokens_on_one_leaf_are_seen_and_survived() -> None:
    layer = nogemm.TreeConfig(depth=4).build(5).train()
    x = torch.randn(1, 5).expand(300, 5)
    layer(x).sum().backward()
    found = layer.path_statistics(x)
    assert found.dead_nodes == 31 - 5
    assert found.balance == 0.0


def test_training_lowers_the_loss() -> None:
    layer = nogemm.TreeConfig(trees=2, depth=4, core=4).build(16)
    x, target = torch.randn(512, 16), torch.randn(512, 16).cumsum(1) / 4
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("core", [0, 6])
def test_fit_explains_most_of_a_dense_layer(core: int) -> None:
    dense = DenseFFN.from_weights(torch.randn(32, 8) / 3, None, torch.randn(8, 32) / 6, torch.randn(8))
    layer = nogemm.TreeConfig(trees=4, depth=4, core=core).build(8)
    x = torch.randn(4000, 8)
    assert layer.fit_activations(dense, x) == layer.fitted == "closed-form"
    target = dense(x)
    assert float((layer(x) - target).square().mean()) < 0.3 * float(target.var())
    assert layer.path_statistics(x).left_fraction == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ShapeError, match=r"fit_tree.*\[N, 8\]"):
        layer.fit_activations(dense, x[:0])


def test_fit_does_not_claim_to_explain_noise() -> None:
    from nogemm.layers.tree.fit import fit_tree

    dense = DenseFFN.from_weights(torch.randn(500, 8) * 50, None, torch.randn(8, 500) / 6, None)
    layer = nogemm.TreeConfig(depth=3).build(8)
    assert fit_tree(layer, dense, torch.randn(2000, 8)) > 0.3


def test_not_finite_tokens_stay_alone() -> None:
    for case in TREE_CASES:
        layer = build(case)
        x = torch.randn(4, case.d_model)
        clean = layer(x)
        x[1, 0], x[2, -1] = float("nan"), -float("inf")
        y = layer(x)
        assert y[1].isnan().all(), case.name
        assert y[2].isnan().all(), case.name
        torch.testing.assert_close(y[[0, 3]], clean[[0, 3]])


def test_config_and_state_round_trip() -> None:
    for case in TREE_CASES:
        layer = build(case)
        again = nogemm.layer_config(case.config.to_dict()).build(case.d_model, case.d_out).eval()
        again.load_state_dict(layer.state_dict())
        x = torch.randn(3, case.d_model)
        check_same_model(case.name, again, layer, answer_to(x))


def test_the_activation_is_the_replaced_layers_unless_said() -> None:
    assert nogemm.TreeConfig().build(8, activation="silu").activation == "silu"
    assert nogemm.TreeConfig().build(8, activation="relu2").activation == "gelu"
    assert nogemm.TreeConfig(activation="relu").build(8, activation="silu").activation == "relu"


def test_values_out_of_range_are_named() -> None:
    for wrong, words in (
        ({"trees": 0}, "trees=0"),
        ({"depth": 21}, "0 to 20.*depth=21"),
        ({"activation": "tanh"}, "gelu, gelu_new.*activation='tanh'"),
        ({"balance": "bias"}, 'branch="bias"'),
        ({"temperature": 0.0}, "temperature"),
        ({"trees": 2000, "depth": 20}, "nodes"),
    ):
        with pytest.raises(ConfigError, match=words):
            nogemm.TreeConfig(**wrong)  # type: ignore[arg-type]
