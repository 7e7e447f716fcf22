"""Figure 4's harness: exact fits reach theory, descent improves, the sweep stays below the dense cost, bad values."""

import math

import pytest
import torch

import nogemm
from nogemm.config import ProjectionConfig
from nogemm.errors import ConfigError
from nogemm_papers.projections import (
    ProjectionBenchArgs,
    best_scale,
    closed_form,
    descend,
    fit_exactly,
    relative_error,
    run_projection_bench,
    sweep,
)

BLOCKED: list[ProjectionConfig] = [
    nogemm.BHConfig(rounds=1, block=16, bias=False),
    nogemm.ShuffleProjectionConfig(block=16, bias=False),
]


def gaussian(d: int) -> torch.Tensor:
    return torch.randn(d, d) / math.sqrt(d)


@pytest.mark.parametrize("config", BLOCKED, ids=lambda c: c.kind)
def test_one_block_diagonal_matrix_reaches_its_closed_form(config: ProjectionConfig) -> None:
    errors = [fit_exactly(config, gaussian(128)) for _ in range(5)]
    expected = closed_form(config, 128)
    assert expected == 1 - 16 / 128
    assert sum(errors) / 5 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("config", BLOCKED, ids=lambda c: c.kind)
def test_no_other_weights_do_better(config: ProjectionConfig) -> None:
    matrix = gaussian(32)
    best = fit_exactly(config, matrix)
    assert descend(config, matrix, ProjectionBenchArgs(d=32, evaluations=60, restarts=1)) == pytest.approx(
        best, rel=1e-3
    )
    assert relative_error(config.build(32, 32), matrix).item() > best  # weights that were not fitted


def test_a_matrix_of_the_right_structure_is_found_exactly() -> None:
    for config in BLOCKED:
        target = config.build(32, 32).dense_matrix().detach()
        assert fit_exactly(config, target) < 1e-12
    low = nogemm.LowRankConfig(rank=5, bias=False)
    assert fit_exactly(low, low.build(32, 32).dense_matrix().detach()) < 1e-12


def test_low_rank_is_the_tail_of_the_spectrum() -> None:
    matrix = gaussian(24)
    values = torch.linalg.svdvals(matrix.double()).square()
    expected = float(values[7:].sum() / values.sum())
    assert fit_exactly(nogemm.LowRankConfig(rank=7, bias=False), matrix) == pytest.approx(expected)


def test_the_sweep_reports_costs_and_theory() -> None:
    args = ProjectionBenchArgs(d=32, matrices=2, evaluations=5, restarts=2)
    lines: list[str] = []
    result = run_projection_bench(args, note=lines.append)
    rows = result["rows"]
    assert len(rows) == len(lines) < len(sweep(32))  # some cost more than the dense matrix
    assert result["dense"] == {"flops": 2 * 32 * 32, "parameters": 32 * 32}
    assert all(row["flops"] <= 2 * 32 * 32 and 0 <= row["error"] <= 1 for row in rows)
    assert {row["projection"] for row in rows} >= {"bh", "shuffle", "low_rank", "hadamard_chain", "random_hadamard"}
    for row in rows:
        assert (row["closed_form"] is None) == (row["deviation"] is None)
        assert row["matrices"] == len(row["errors"]) == (1 if row["fit"] == "descent" else 2)


def test_the_best_scale_is_the_best() -> None:
    config = nogemm.RandomHadamardConfig(bias=False)
    matrix = torch.randn(16, 16)
    torch.manual_seed(3)
    found = best_scale(config, matrix)
    torch.manual_seed(3)
    random = config.build(16, 16).double().dense_matrix()
    errors = [float((c * random - matrix).square().sum() / matrix.square().sum()) for c in torch.linspace(-1, 1, 4001)]
    assert found == pytest.approx(min(errors), abs=1e-6)
    assert 0.9 < found < 1


def test_blocks_at_the_papers_width_reach_the_closed_form() -> None:
    matrices = [torch.randn(512, 512) for _ in range(5)]
    for config in (
        nogemm.BHConfig(rounds=1, block=64, bias=False),
        nogemm.ShuffleProjectionConfig(block=64, bias=False),
    ):
        mean = sum(fit_exactly(config, matrix) for matrix in matrices) / 5
        assert mean == pytest.approx(closed_form(config, 512), rel=0.01)


@pytest.mark.parametrize("change", [{"d": 24}, {"d": 1}, {"matrices": 0}, {"evaluations": 0}, {"restarts": 0}])
def test_bad_values_are_named(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(change))}"):
        run_projection_bench(ProjectionBenchArgs(**change))
