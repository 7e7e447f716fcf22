"""`nogemm bench projections`: how well each projection approximates a Gaussian matrix, against FLOP and parameters.

Figure 4 of LookupFFN (Zeng et al., 2023). The paper states no size, optimiser or loss; here they are stated: M is D x D
with entries N(0, 1/D), and the figure is the relative squared error |R - M|^2 / |M|^2 of the best R found.

Legend: D width, w weights of a projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nogemm.bench.engine.result import origin
from nogemm.config import ProjectionConfig
from nogemm.errors import ConfigError
from nogemm.projections import (
    AcdcConfig,
    BHConfig,
    DenseProjectionConfig,
    HadamardChainConfig,
    LowRankConfig,
    Projection,
    RandomHadamardConfig,
    ShuffleProjectionConfig,
)
from nogemm.running.partial import Keep

Note = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class ProjectionBenchArgs:
    """Say what is approximated and how hard the fits try.

    Attributes:
        d: width D, a power of two.
        matrices: Gaussian matrices that exact fits are averaged over; fits by descent use the first one.
        evaluations: of loss and gradient per descent.
        restarts: descents per point, from different starts; the best counts.
        seed: of matrices and starts.
    """

    d: int = 512
    matrices: int = 5
    evaluations: int = 150
    restarts: int = 2
    seed: int = 0


def run_projection_bench(
    args: ProjectionBenchArgs, *, note: Note | None = None, keep: Keep | None = None
) -> dict[str, Any]:
    """Fit every projection that costs no more than the dense one; `keep` gets the result as it grows.

    Returns:
        `origin` and {"dense": its FLOP and parameters, "rows"}; a row has "projection" (kind),
        "label", "config", "flops", "parameters", "error" (mean over "matrices"), "errors", "fit" ("exact",
        "descent", or "scale" where there are no weights), and where one is known "closed_form", the expected error, and
        "deviation", relative to it.
    Raises:
        ConfigError: a width that is no power of two, or nothing to average over.
    """
    if args.d < 2 or args.d & (args.d - 1):
        raise ConfigError(f"--d must be a power of two, at least 2, got {args.d}")
    for name in ("matrices", "evaluations", "restarts"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    say = note or (lambda line: None)
    generator = torch.Generator().manual_seed(args.seed)
    matrices = [torch.randn(args.d, args.d, generator=generator) / math.sqrt(args.d) for _ in range(args.matrices)]
    dense = DenseProjectionConfig(bias=False).build(args.d, args.d).cost(4)
    result = origin(asdict(args)) | {"dense": {"flops": dense.flops, "parameters": dense.parameters}}
    rows: list[dict[str, Any]] = []
    for config in sweep(args.d):
        cost = config.build(args.d, args.d).cost(4)
        if cost.flops <= dense.flops:
            say(f"{config.kind} {label(config)}")
            rows.append(_row(config, matrices, args) | {"flops": cost.flops, "parameters": cost.parameters})
            if keep is not None:
                keep(result | {"rows": list(rows)})
    return result | {"rows": rows}


def sweep(d: int) -> list[ProjectionConfig]:
    """List the projections of the figure, cheap to dear within each family."""
    blocks = [b for b in (8, 16, 32, 64, 128, 256) if b <= d // 2]
    depths = (1, 2, 4, 8, 16, 32)
    return [
        *(BHConfig(rounds=1, block=b, bias=False) for b in blocks),
        *(ShuffleProjectionConfig(block=b, bias=False) for b in blocks),
        *(LowRankConfig(rank=b, bias=False) for b in blocks),
        *(BHConfig(rounds=m, block=b, bias=False) for m in (2, 3, 4) for b in blocks),
        *(RandomHadamardConfig(learnable=learnable, bias=False) for learnable in (False, True)),
        *(HadamardChainConfig(depth=k, bias=False) for k in depths),
        *(AcdcConfig(depth=k, bias=False) for k in depths),
    ]


def label(config: ProjectionConfig) -> str:
    """Name a point of the figure by what was swept."""
    if isinstance(config, BHConfig):
        return f"BH{config.rounds}, block {config.block}"
    fields = [(name, value) for name, value in config.to_dict().items() if name not in ("kind", "bias")]
    return ", ".join(f"{name} {value}" for name, value in fields)


def closed_form(config: ProjectionConfig, d: int) -> float | None:
    """Return the expected error where theory has it: 1 - b/D for one block-diagonal matrix and an orthogonal map."""
    if isinstance(config, ShuffleProjectionConfig) or (isinstance(config, BHConfig) and config.rounds == 1):
        return 1.0 - config.block / d
    return None


def _row(config: ProjectionConfig, matrices: Sequence[Tensor], args: ProjectionBenchArgs) -> dict[str, Any]:
    expected = closed_form(config, args.d)
    if isinstance(config, RandomHadamardConfig) and not config.learnable:
        fit, errors = "scale", [best_scale(config, matrix) for matrix in matrices]
    elif expected is not None or isinstance(config, LowRankConfig):
        fit, errors = "exact", [fit_exactly(config, matrix) for matrix in matrices]
    else:
        fit, errors = "descent", [descend(config, matrices[0], args)]
    mean = sum(errors) / len(errors)
    return {
        "projection": config.kind,
        "label": label(config),
        "config": config.to_dict(),
        "error": mean,
        "errors": errors,
        "matrices": len(errors),
        "fit": fit,
        "closed_form": expected,
        "deviation": None if expected is None else mean / expected - 1.0,
    }


def relative_error(projection: Projection, matrix_DD: Tensor) -> Tensor:
    """Return |R - M|^2 / |M|^2, with R read off the projection's own forward pass."""
    return (projection.dense_matrix() - matrix_DD).square().sum() / matrix_DD.square().sum()


def best_scale(config: ProjectionConfig, matrix_DD: Tensor) -> float:
    """Return the error of a projection without weights, times the best number: 1 - <R, M>^2 / (|R|^2 |M|^2)."""
    with torch.no_grad():
        found_DD = config.build(*reversed(matrix_DD.shape)).double().dense_matrix()
        overlap = (found_DD * matrix_DD).sum().square() / (found_DD.square().sum() * matrix_DD.double().square().sum())
    return 1.0 - float(overlap)


def fit_exactly(config: ProjectionConfig, matrix_DD: Tensor) -> float:
    """Set the weights to the least-squares solution and return the error that is left.

    Low rank: the truncated singular value decomposition. One block-diagonal matrix and an orthogonal map: R is linear
    in w with an orthonormal design, R = J w and J'J = 1, so w = J'M, which is the gradient of <R(w), M>.
    """
    projection = config.build(*reversed(matrix_DD.shape)).double()
    wide = matrix_DD.double()
    with torch.no_grad():
        if isinstance(config, LowRankConfig):
            u, s, v = torch.linalg.svd(wide)
            rank = config.rank
            projection.get_parameter("weight").copy_(v[:rank])
            projection.get_parameter("up").copy_(u[:, :rank] * s[:rank])
        else:
            with torch.enable_grad():
                inner = (projection.dense_matrix() * wide).sum()
            (solution,) = torch.autograd.grad(inner, projection.weights())
            projection.get_parameter("weight").copy_(solution)
        return float(relative_error(projection, wide))


def descend(config: ProjectionConfig, matrix_DD: Tensor, args: ProjectionBenchArgs) -> float:
    """Minimise the error by L-BFGS with a line search, which finds its own rates, from several starts.

    Adam at any of a dozen rates stays far above it on the chains of diagonals.
    """
    best = 1.0  # R = 0 is within reach of every projection
    for restart in range(args.restarts):
        torch.manual_seed(args.seed + 1 + restart)
        projection = config.build(args.d, args.d)
        # Half of the starts near the identity where the projection's authors start there, half at random rotations.
        projection.reset_parameters("scaled" if restart % 2 == 0 else "reference")
        best = min(best, _lbfgs(projection, matrix_DD, args.evaluations))
    return best


def _lbfgs(projection: Projection, matrix_DD: Tensor, evaluations: int) -> float:
    optimiser = torch.optim.LBFGS(
        projection.weights(),
        max_iter=evaluations,
        max_eval=evaluations,
        history_size=10,
        tolerance_change=0.0,
        tolerance_grad=1e-9,
        line_search_fn="strong_wolfe",
    )
    best = math.inf

    def closure() -> float:
        nonlocal best
        optimiser.zero_grad()
        loss = relative_error(projection, matrix_DD)
        loss.backward()
        best = min(best, loss.item())
        return loss.item()

    optimiser.step(closure)
    return best
