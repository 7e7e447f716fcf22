"""Is a site still random? Packing or saving untrained layers warns; training by any optimiser clears it.

A layer that conversion left random keeps a snapshot: the version counter of every parameter, which torch raises at
every in-place write (an optimiser step, a load), and a sample of its values, which also sees writes through `.data`.
A cast leaves the counters alone; a copied layer is compared by its values.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass

import torch
from torch import nn

from nogemm.convert.sites import converted
from nogemm.layers import FFN

SAMPLE = 1024  # values kept per parameter


@dataclass
class _Mark:
    parameter: weakref.ref[nn.Parameter]
    version: int
    sample: torch.Tensor


def mark_random(layer: FFN) -> None:
    """Remember the present parameters as untrained."""
    marks = [_Mark(weakref.ref(p), p._version, _sample(p)) for p in layer.parameters() if p.numel() and not p.is_meta]
    object.__setattr__(layer, "untrained", marks)


def is_random(layer: FFN) -> bool:
    """Tell whether the layer is as random as conversion left it."""
    marks: list[_Mark] | None = getattr(layer, "untrained", None)
    if layer.fitted != "random" or marks is None:
        return False
    parameters = [p for p in layer.parameters() if p.numel()]
    if len(parameters) != len(marks):  # compressed since: the values that are left decide
        parameters = [p for p in parameters if any(m.parameter() is p for m in marks)]
        marks = [m for m in marks if any(m.parameter() is p for p in parameters)]
    return not any(_changed(p, mark) for p, mark in zip(parameters, marks, strict=True))


def fitted_state(layer: FFN) -> str:
    """Return the layer's `fitted`, or "trained" if it was random and has changed since."""
    if layer.fitted == "random" and not is_random(layer):
        return "trained"
    return layer.fitted


def warn_if_random(model: nn.Module, action: str) -> None:
    """Warn, naming the sites, if any site of the model is still random."""
    names = [name for name, layer in converted(model).items() if is_random(layer)]
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        warnings.warn(
            f"{action}: {len(names)} converted FFNs are still random ({shown}); run nogemm.distil first",
            UserWarning,
            stacklevel=3,
        )


def _changed(parameter: nn.Parameter, mark: _Mark) -> bool:
    if mark.parameter() is parameter and mark.version != parameter._version:
        return True
    # The layer may have been through bfloat16 and back, so equal means equal up to its rounding.
    return not torch.allclose(_sample(parameter).float(), mark.sample.float(), rtol=2**-7, atol=1e-6)


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)].to("cpu", copy=True)
