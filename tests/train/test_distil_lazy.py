"""distil() with LazyAdam: trees are stepped by rows, learn as with AdamW, and a resumed run is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_distil import SAME_RUN, check_same_run, interrupt_after, run, weights
from tiny_training import apart, make_pair, make_texts
from torch import nn

import nogemm
from nogemm.convert import converted
from nogemm.layers import TreeFFN
from nogemm.train import DistilReport, LazyAdam, TrainingInterrupted
from nogemm.train import checkpoint as ckpt
from nogemm.train.optim import clip_gradients

TREE = nogemm.TreeConfig(trees=2, depth=5)
LAZY: dict[str, Any] = {"optimizer": "lazy-adam", "lr_other": 1e-2}


def seen_by_lazy_adam(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record of every step with sparse gradients whether rows were left out."""
    steps: list[bool] = []
    plain = LazyAdam.step

    def step(self: LazyAdam, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        steps.extend(g._nnz() < g.shape[:-1].numel() for g in gradients if g.is_sparse)
        return plain(self, closure)

    monkeypatch.setattr(LazyAdam, "step", step)
    return steps


def test_both_stages_learn_from_the_visited_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = seen_by_lazy_adam(monkeypatch)
    reports: list[DistilReport] = []
    for change in (LAZY, {**LAZY, "optimizer": "adamw"}):
        pair = make_pair(TREE)
        reports.append(run(pair, tokens=12_000, stage1_share=0.6, **change))
        assert not any(layer.row_sparse for layer in converted(pair.model).values() if isinstance(layer, TreeFFN))
        assert all(p.grad is None for p in pair.model.parameters())
    assert any(steps)
    lazy, dense = reports
    for ours, theirs in zip(lazy.stages, dense.stages, strict=True):
        assert ours.last["loss"] < ours.first["loss"]
        assert ours.last["loss"] == pytest.approx(theirs.last["loss"], rel=0.15)


@pytest.mark.parametrize("after", [3, 19])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    options: dict[str, Any] = {**LAZY, "validate_tokens": 2_000, "validation": make_texts(30, seed=9)}
    whole, stopped, resumed = make_pair(TREE), make_pair(TREE), make_pair(TREE)
    report = run(whole, output_dir=tmp_path / "whole", **options)
    interrupt_after(monkeypatch, steps=after)
    with pytest.raises(TrainingInterrupted, match="resume=True"):
        run(stopped, output_dir=tmp_path / "parts", **options)
    monkeypatch.undo()
    kept = ckpt.latest(tmp_path / "parts")
    assert kept is not None
    assert any(name.endswith(".seen") for name in ckpt.read_checkpoint(kept).parts["optimiser"])
    again = run(resumed, output_dir=tmp_path / "parts", resume=True, **options)
    check_same_run(make_pair(TREE), whole, report, resumed, again)
    start = weights(make_pair(TREE).model)
    assert apart(weights(whole.model), weights(stopped.model), start) > 10 * SAME_RUN


def test_another_optimiser_does_not_resume_a_run(tmp_path: Path) -> None:
    run(make_pair(TREE), output_dir=tmp_path, tokens=500, **LAZY)
    with pytest.raises(nogemm.train.TrainingError, match="optimizer: lazy-adam, now adamw"):
        run(make_pair(TREE), output_dir=tmp_path, tokens=500, resume=True, **{**LAZY, "optimizer": "adamw"})
    with pytest.raises(nogemm.ConfigError, match="optimizer must be one of adamw, lazy-adam, got 'sgd'"):
        run(make_pair(TREE), optimizer="sgd")


def test_sparse_gradients_are_clipped_as_dense_ones_are() -> None:
    dense, sparse = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(4, 2))
    place, rows = torch.tensor([[1, 3, 1]]), torch.tensor([[3.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    sparse.grad = torch.sparse_coo_tensor(place, rows, (4, 2), check_invariants=False)
    dense.grad = sparse.grad.to_dense()
    assert clip_gradients([sparse], 1.0) == pytest.approx(40**0.5)
    assert clip_gradients([dense], 1.0) == pytest.approx(40**0.5)
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    assert float(dense.grad.norm()) == pytest.approx(1.0)
