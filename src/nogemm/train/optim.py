"""Optimiser of a distillation: one group each for projections, tables, the rest of the new layers, and the backbone.

Tables and projections want other rates than pretrained weights: a table row sees a token only when its code is hit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.errors import ConfigError
from nogemm.layers._base import FFN
from nogemm.train.lazy_adam import LazyAdam
from nogemm.train.options import DistilOptions

_BETAS, _EPS = (0.9, 0.98), 1e-8


def layer_groups(layers: Iterable[FFN]) -> dict[str, list[nn.Parameter]]:
    """Join the optimiser groups of new layers: "projection", "tables" and "other"."""
    groups: dict[str, list[nn.Parameter]] = {"projection": [], "tables": [], "other": []}
    for layer in layers:
        for name, parameters in layer.optimiser_groups().items():
            groups[name] += parameters
    return groups


def backbone_parameters(model: nn.Module, layers: Iterable[nn.Module], embeddings: bool) -> list[nn.Parameter]:
    """Return the model's trainable parameters outside the new layers, with or without embedding tables."""
    skip = {id(p) for layer in layers for p in layer.parameters()}
    if not embeddings:
        skip |= {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in skip]


def make_optimiser(
    groups: Mapping[str, list[nn.Parameter]], options: DistilOptions, factor: float = 1.0
) -> tuple[torch.optim.Optimizer, dict[str, float]]:
    """Make a distillation's optimiser; return it and the peak rates.

    `factor` scales the rates of the new layers, not that of the backbone.
    """
    rates = {
        "projection": options.lr_projection * factor,
        "tables": options.lr_tables * factor,
        "other": options.lr_other * factor,
        "backbone": options.lr_backbone,
    }
    return optimiser_of(groups, rates, options.optimizer, options.weight_decay, caller="distil"), rates


def optimiser_of(
    groups: Mapping[str, list[nn.Parameter]],
    rates: Mapping[str, float],
    kind: str,
    decay: float = 0.0,
    undecayed: Collection[str] = ("tables",),
    betas: tuple[float, float] = _BETAS,
    eps: float = _EPS,
    *,
    caller: str,
) -> torch.optim.Optimizer:
    """Make an optimiser with two groups for each non-empty entry whose rate is above 0: one of them decays.

    Args:
        groups: parameters by name.
        rates: peak rate of each.
        kind: "adamw" or "lazy-adam".
        decay: weight decay of matrices.
        undecayed: groups whose matrices do not decay either.
        caller: starts the message.
    Raises:
        ConfigError: no group is left.
    """
    rows: list[dict[str, Any]] = []
    for name, parameters in groups.items():
        if not parameters or rates[name] == 0:
            continue
        decayed = [p for p in parameters if p.dim() > 1 and name not in undecayed]
        plain = [p for p in parameters if p.dim() <= 1 or name in undecayed]
        for part, weight in ((decayed, decay), (plain, 0.0)):
            if part:
                rows.append({"params": part, "lr": rates[name], "weight_decay": weight, "name": name})
    if not rows:
        raise ConfigError(f"{caller}: nothing to train: every group of parameters is empty or has a rate of 0")
    if kind == "lazy-adam":
        return LazyAdam(rows, betas=betas, eps=eps)
    return torch.optim.AdamW(rows, betas=betas, eps=eps, fused=True)


def settle(optimiser: torch.optim.Optimizer) -> None:
    """Bring the rows that rested up to date, before somebody looks at them."""
    if isinstance(optimiser, LazyAdam):
        optimiser.settle()


def set_rates(optimiser: torch.optim.Optimizer, rates: Mapping[str, float], factor: float) -> None:
    """Set every group's rate to its peak times `factor`."""
    for group in optimiser.param_groups:
        group["lr"] = rates[group["name"]] * factor


def rate_factor(fraction: float, warmup: float) -> float:
    """Rise linearly from 0 to 1 over `warmup`, then fall linearly to 0 at fraction 1."""
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < warmup:
        return max(fraction / warmup, 1e-3)
    return max((1.0 - fraction) / max(1.0 - warmup, 1e-9), 1e-3)


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> float:
    """Scale gradients down to a norm of at most `largest`; return the norm before, which may be NaN or infinite."""
    gradients = [gradient_numbers(p) for p in parameters if p.grad is not None]
    if not gradients:
        return 0.0
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm) and norm > largest:
        for gradient in gradients:
            gradient.mul_(largest / norm)
    return norm


def gradient_numbers(parameter: nn.Parameter) -> Tensor:
    """Return what a parameter's gradient holds, to be changed in place: of a sparse one the visited rows."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()  # a row in two parts would count twice in the norm
    return parameter.grad.values()


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state as named tensors: `index.moment`."""
    out: dict[str, Tensor] = {}
    for index, state in optimiser.state_dict()["state"].items():
        for name, value in state.items():
            out[f"{index}.{name}"] = torch.as_tensor(value)
    return out


def load_optimiser_tensors(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take over what `optimiser_tensors` returned for an optimiser with the same groups."""
    packed = optimiser.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value.clone()
    packed["state"] = state
    optimiser.load_state_dict(packed)
