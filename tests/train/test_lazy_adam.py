"""LazyAdam against torch's dense AdamW, which gives resting rows a gradient of zero."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nogemm
from nogemm.errors import ConfigError
from nogemm.layers import TreeFFN
from nogemm.ops.row_adam import row_adam, row_adam_reference
from nogemm.testing.compare import check_equal
from nogemm.train import lazy_adam
from nogemm.train.lazy_adam import LazyAdam


def visits(steps: int, rows: int, seed: int = 0) -> list[Tensor]:
    """Draw which rows are visited in each step: row 0 always, others ever more rarely."""
    generator = torch.Generator().manual_seed(seed)
    chance = 1.0 / (1 + torch.arange(rows)).float() ** 1.5
    return [torch.nonzero(torch.rand(rows, generator=generator) < chance).flatten() for _ in range(steps)]


def sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, check_invariants=False)


def run(settings: dict[str, Any], steps: int = 60, rates: bool = False) -> tuple[Tensor, Tensor, dict[str, Any]]:
    torch.manual_seed(3)
    start = torch.randn(12, 5)
    dense, lazy = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    reference, ours = torch.optim.AdamW([dense], **settings), LazyAdam([lazy], **settings)
    for t, rows in enumerate(visits(steps, 12)):
        values = torch.randn(len(rows), 5)
        for optimiser in (reference, ours):
            if rates:
                optimiser.param_groups[0]["lr"] = settings["lr"] * (1.0 - t / steps)
        lazy.grad = sparse(rows, values, lazy.shape)
        dense.grad = lazy.grad.to_dense()
        reference.step()
        ours.step()
    return dense.detach(), lazy.detach(), {"ours": ours, "reference": reference, "lazy": lazy, "dense": dense}


SETTINGS = (
    {"lr": 0.01, "eps": 1e-12, "weight_decay": 0.0},
    {"lr": 0.01, "eps": 1e-12, "weight_decay": 0.3, "betas": (0.9, 0.98)},
    {"lr": 0.003, "eps": 1e-8, "weight_decay": 0.0, "betas": (0.0, 0.9)},
)


@pytest.mark.parametrize("rates", [False, True])
@pytest.mark.parametrize("settings", SETTINGS)
def test_settled_rows_are_where_dense_adam_has_them(settings: dict[str, Any], rates: bool) -> None:
    dense, lazy, parts = run(settings, rates=rates)
    parts["ours"].settle()
    torch.testing.assert_close(lazy, dense, rtol=1e-4, atol=1e-5)
    ours, reference = parts["ours"].state[parts["lazy"]], parts["reference"].state[parts["dense"]]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours[name], reference[name], rtol=1e-4, atol=1e-7)


def test_resting_rows_are_not_touched_until_settled() -> None:
    dense, lazy, parts = run(SETTINGS[0])
    before = lazy.clone()
    lazy_parameter = parts["lazy"]
    lazy_parameter.grad = sparse(torch.tensor([0]), torch.randn(1, 5), lazy.shape)
    parts["ours"].step()
    check_equal("all but row 0", lazy_parameter.detach()[1:], before[1:])
    # The comparison can fail: before it is settled, the rarest row lags behind.
    assert not torch.allclose(before, dense, rtol=1e-4, atol=1e-5)


def test_windows_are_settled_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_adam, "WINDOW", 7)
    dense, lazy, parts = run(SETTINGS[1])
    parts["ours"].settle()
    torch.testing.assert_close(lazy, dense, rtol=1e-4, atol=1e-5)


def test_dense_gradients_step_as_adamw() -> None:
    start = torch.randn(6, 4)
    left, right = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours = LazyAdam([left], lr=0.01, weight_decay=0.1)
    reference = torch.optim.AdamW([right], lr=0.01, weight_decay=0.1)
    for _ in range(20):
        left.grad = right.grad = torch.randn(6, 4)
        ours.step()
        reference.step()
    torch.testing.assert_close(left, right)


def test_state_round_trip_continues_exactly() -> None:
    _, _, parts = run(SETTINGS[1], steps=20)
    other = nn.Parameter(parts["lazy"].detach().clone())
    again = LazyAdam([other], **SETTINGS[1])
    again.load_state_dict(copy.deepcopy(parts["ours"].state_dict()))
    for rows in visits(20, 12, seed=5):
        values = torch.randn(len(rows), 5)
        for parameter in (other, parts["lazy"]):
            parameter.grad = sparse(rows, values, other.shape)
        again.step()
        parts["ours"].step()
    check_equal("continued", other.detach(), parts["lazy"].detach())


def train(layer: TreeFFN, optimiser: torch.optim.Optimizer, steps: int) -> float:
    torch.manual_seed(5)
    x, target = torch.randn(256, 16), torch.randn(256, 16).cumsum(1) / 4
    loss = torch.zeros(())
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimiser.step()
    return loss.item()


def test_a_tree_trains_as_well_by_rows() -> None:
    losses = []
    for by_rows in (False, True):
        torch.manual_seed(0)
        layer = nogemm.TreeConfig(trees=2, depth=5).build(16)
        layer.row_sparse = by_rows
        kind = LazyAdam if by_rows else torch.optim.AdamW
        losses.append(train(layer, kind(layer.parameters(), lr=1e-2, weight_decay=0.0), 40))
        if by_rows:
            assert layer.weight_in.grad is not None
            assert layer.weight_in.grad.is_sparse
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_native_rows_match_the_reference(isa: str) -> None:
    for rows, width in ((1, 1), (9, 37), (20, 768)):
        tensors = [torch.randn(30, width), torch.randn(30, width), torch.rand(30, width)]
        index = torch.randperm(30)[:rows].int()
        grad, arrears = torch.randn(rows, width), torch.rand(rows, 4)
        constants = {"beta1": 0.9, "beta2": 0.99, "step": 0.1, "root": 1.5, "eps": 1e-6, "keep": 0.98}
        exact = [t.double() for t in tensors]
        row_adam_reference(exact[0], exact[1], exact[2], index, grad.double(), arrears.double(), *constants.values())
        for threads in (1, 2):
            torch.set_num_threads(threads)
            got = [t.clone() for t in tensors]
            row_adam(got[0], got[1], got[2], index, grad, arrears, **constants)
            for one, other in zip(got, exact, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got[0].double(), tensors[0].double())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"beta1 < sqrt\(beta2\)"):
        LazyAdam([nn.Parameter(torch.zeros(2))], betas=(0.99, 0.9))
    matrix = torch.zeros(3, 2)
    with pytest.raises((IndexError, RuntimeError), match="index"):
        row_adam(
            matrix, matrix.clone(), matrix.clone(), torch.tensor([3], dtype=torch.int32), torch.zeros(1, 2),
            torch.ones(1, 4), beta1=0.9, beta2=0.99, step=0.1, root=1.0, eps=1e-8, keep=1.0,
        )  # fmt: skip
    with pytest.raises(nogemm.ShapeError, match="disagree"):
        row_adam(
            matrix, matrix, matrix, torch.zeros(1, dtype=torch.int32), torch.zeros(1, 3), torch.ones(1, 4),
            beta1=0.9, beta2=0.99, step=0.1, root=1.0, eps=1e-8, keep=1.0,
        )  # fmt: skip
