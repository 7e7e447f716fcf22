"""What happens to gradients before an update: averaged over processes, looked at, clipped.

Legend: V visited rows, D width, P processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nogemm.convert.sites import converted
from nogemm.train.errors import TrainingError
from nogemm.train.loop.options import LoopOptions
from nogemm.train.optim import backbone_parameters, gradient_numbers, layer_groups, optimiser_of

_PACE = 0.9  # of the running mean of gradient norms


def make_groups(model: nn.Module, options: LoopOptions) -> dict[str, list[nn.Parameter]]:
    """Sort what is trained: "projection", "tables" and "other" of the new layers, and "backbone".

    Parameters that are frozen (`requires_grad`) and groups with a rate of 0 are left out.
    """
    return with_rates(all_groups(model), options)


def all_groups(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort a model's parameters that are not frozen, whatever their rates."""
    layers = list(converted(model).values())
    return {**layer_groups(layers), "backbone": backbone_parameters(model, layers, embeddings=True)}


def with_rates(groups: Mapping[str, list[nn.Parameter]], options: LoopOptions) -> dict[str, list[nn.Parameter]]:
    """Leave out groups that are empty or have a rate of 0."""
    return {name: group for name, group in groups.items() if group and options.rate(name) > 0}


def make_updater(
    groups: Mapping[str, list[nn.Parameter]], options: LoopOptions, caller: str = "train"
) -> torch.optim.Optimizer:
    """Make the optimiser of a run at its peak rates."""
    return optimiser_of(
        groups,
        {name: options.rate(name) for name in groups},
        options.optimizer,
        options.weight_decay,
        () if options.decay_tables else ("tables",),
        (options.beta1, options.beta2),
        options.eps,
        caller=caller,
    )


def refit(model: nn.Module) -> None:
    """Fit anew what layers derive from their own weights alone, such as low-rank sketches."""
    for layer in converted(model).values():
        layer.fit_own_weights()


def rate_share(fraction: float, options: LoopOptions) -> float:
    """Return the share of the peak rate when `fraction` of the budget is used up: up linearly, then down."""
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < options.warmup:
        return max(fraction / options.warmup, 1e-3)
    if options.decay == "constant":
        return 1.0
    left = (1.0 - fraction) / max(1.0 - options.warmup, 1e-9)
    shape = left if options.decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
    return options.final + (1.0 - options.final) * shape


def row_sparse_parameters(model: nn.Module) -> list[str]:
    """Name the parameters whose gradients hold their visited rows alone."""
    found = {id(p) for layer in converted(model).values() if layer.row_sparse for p in layer.row_parameters()}
    return [name for name, p in model.named_parameters() if id(p) in found]


def average_rows(parameter: nn.Parameter) -> None:
    """Average a gradient of rows over all processes: each sends the rows that it visited, and adds up what it gets.

    An all-reduce would send the whole matrix. Rows are added in the order of processes, so all end with equal bits.

    Cost: each process receives P V (D + 1) numbers, V of the process that visited most.
    """
    world = dist.get_world_size()
    gradient = parameter.grad
    if gradient is None:
        gradient = torch.sparse_coo_tensor(
            torch.zeros(parameter.dim() - 1, 0, dtype=torch.int64, device=parameter.device),
            parameter.new_zeros(0, parameter.shape[-1]),
            parameter.shape,
            check_invariants=False,
        )
    gradient = (gradient if gradient.is_sparse else gradient.to_sparse(parameter.dim() - 1)).coalesce()
    place, values_VD = gradient.indices(), gradient.values()
    count = torch.tensor([place.shape[1]], device=place.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    dist.all_gather(counts, count)
    sizes = [int(size) for size in counts]
    most = max(sizes)
    if most == 0:
        parameter.grad = None
        return
    padded_place = place.new_zeros(place.shape[0], most)
    padded_place[:, : place.shape[1]] = place
    padded_VD = values_VD.new_zeros(most, values_VD.shape[1])
    padded_VD[: values_VD.shape[0]] = values_VD
    places = [torch.empty_like(padded_place) for _ in range(world)]
    values = [torch.empty_like(padded_VD) for _ in range(world)]
    dist.all_gather(places, padded_place)
    dist.all_gather(values, padded_VD)
    parameter.grad = torch.sparse_coo_tensor(
        torch.cat([part[:, :size] for part, size in zip(places, sizes, strict=True)], dim=1),
        torch.cat([part[:size] for part, size in zip(values, sizes, strict=True)]) / world,
        parameter.shape,
        check_invariants=False,
    ).coalesce()


class Watch:
    """Norms of the gradients of each group: what they are now, and what they used to be."""

    def __init__(self) -> None:
        self.usual: dict[str, float] = {}
        self.before: dict[str, float] = {}

    def norms(self, groups: Mapping[str, list[nn.Parameter]]) -> dict[str, float]:
        """Return the norm of each group's gradient; it may be NaN or infinite."""
        names = [name for name, group in groups.items() if any(p.grad is not None for p in group)]
        norms = [
            torch.nn.utils.get_total_norm([gradient_numbers(p) for p in groups[name] if p.grad is not None])
            for name in names
        ]
        return dict(zip(names, torch.stack(norms).tolist(), strict=True)) if names else {}

    def accept(self, norms: Mapping[str, float]) -> None:
        """Remember norms that were finite."""
        self.before = dict(norms)
        for name, norm in norms.items():
            self.usual[name] = _PACE * self.usual.get(name, norm) + (1.0 - _PACE) * norm

    def complaint(
        self, norms: Mapping[str, float], loss: float, step: int, groups: Mapping[str, list[nn.Parameter]]
    ) -> TrainingError:
        """Return an error that says which group of parameters blew up."""
        weights = [name for name, group in groups.items() if not all(bool(p.isfinite().all()) for p in group)]
        broken = [name for name, norm in norms.items() if not math.isfinite(norm)]
        what = f"the loss is {loss}" if not math.isfinite(loss) else "a gradient is not finite"
        said = [f"{what} at step {step + 1}"]
        if weights:
            said.append(f"weights that are not finite: {', '.join(weights)}")
        if broken:
            said.append(f"gradients that are not finite: {', '.join(broken)}")
        grown = {name: norm / max(self.usual[name], 1e-30) for name, norm in self.before.items()}
        if grown:
            worst = max(grown, key=lambda name: grown[name])
            said.append(
                f"what had grown most before was the gradient of {worst}, to {grown[worst]:.3g} times its usual norm"
            )
        return TrainingError("; ".join(said) + ". Lower the learning rates, or clip")


def clip(groups: Mapping[str, list[nn.Parameter]], norms: Mapping[str, float], largest: float) -> float:
    """Scale all gradients down to a common norm of at most `largest` (0: any); return the norm before."""
    norm = math.sqrt(sum(value**2 for value in norms.values()))
    if 0 < largest < norm:
        scale(groups, largest / norm)
    return norm


def scale(groups: Mapping[str, list[nn.Parameter]], factor: float) -> None:
    """Multiply all gradients."""
    for group in groups.values():
        for parameter in group:
            if parameter.grad is not None:
                gradient_numbers(parameter).mul_(factor)


def agreed_array(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Add an array up over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = torch.from_numpy(values).to(device)
    dist.all_reduce(total)
    return total.cpu().numpy()


def agreed(values: list[float], device: torch.device) -> list[float]:
    """Add numbers up over all processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total: Tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()
