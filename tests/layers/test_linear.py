"""One linear map: solved by hand's least squares, its rank, its cost."""

from __future__ import annotations

import pytest
import torch

import nogemm
from nogemm.errors import ConfigError


def test_a_linear_target_is_found_exactly() -> None:
    torch.manual_seed(0)
    x, matrix, bias = torch.randn(300, 12) + 0.5, torch.randn(12, 9), torch.randn(9)
    layer = nogemm.LinearConfig().build(12, 9)
    assert layer.solve(x, x @ matrix + bias) < 1e-8
    torch.testing.assert_close(layer(x), x @ matrix + bias, rtol=1e-3, atol=1e-3)


def test_the_best_map_of_a_rank_is_taken() -> None:
    torch.manual_seed(0)
    x, low = torch.randn(400, 10), torch.randn(10, 3) @ torch.randn(3, 8)
    y = x @ low + 0.1 * torch.randn(400, 8)
    left = [nogemm.LinearConfig(rank=rank).build(10, 8).solve(x, y) for rank in (1, 2, 3, 8, 20)]
    assert left == sorted(left, reverse=True)
    assert left[1] > 0.05 > left[2]
    layer = nogemm.LinearConfig(rank=2).build(10, 8)
    layer.solve(x, y)
    assert torch.linalg.matrix_rank(layer(torch.eye(10)) - layer(torch.zeros(1, 10)), atol=1e-3) == 2
    share = (layer(x).detach() - y).square().sum() / (y - y.mean(0)).square().sum()
    assert float(share) == pytest.approx(left[1], rel=1e-3)


def test_it_starts_as_the_map_nearest_to_the_dense_layer() -> None:
    torch.manual_seed(0)
    dense, x = nogemm.DenseConfig().build(16, hidden=64), torch.randn(500, 16)
    layer = nogemm.LinearConfig().build(16)
    assert layer.fit_activations(dense, x) == "closed-form"
    goal = dense(x).detach()
    error = float((layer(x).detach() - goal).square().mean() / goal.var(0).mean())
    assert 0 < error < 0.9


def test_cost_of_both_forms() -> None:
    assert nogemm.LinearConfig().build(16, 24).cost(2).flops == 2 * 2 * 16 * 24
    assert nogemm.LinearConfig(rank=3).build(16, 24).cost(1).flops == 2 * 3 * (16 + 24)
    with pytest.raises(ConfigError, match="rank=0"):
        nogemm.LinearConfig(rank=0)
