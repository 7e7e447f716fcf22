"""Is a site still random? Packing or saving untrained layers warns; training by any optimiser clears it.

A layer that conversion left random keeps a snapshot: the version counter of every parameter, which torch raises at
every in-place write (an optimiser step, a load), and a sample of its values, which also sees writes through `.data`.
A cast leaves the counters alone. A layer that is copied or pickled takes its snapshot along.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch import nn

from nogemm.convert.sites import converted
from nogemm.layers import FFN

SAMPLE = 1024  # values kept per parameter


class _Mark:
    """One parameter as conversion left it. Pickled or copied along with its layer, it follows the copy's parameter."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._follow(parameter)
        self.sample = _sample(parameter)
        self.changed = False

    def _follow(self, parameter: nn.Parameter | None) -> None:
        # Weakly: whoever frees a layer's parameter, to compress it for example, must get the memory back.
        self.parameter = None if parameter is None else weakref.ref(parameter)
        self.version = 0 if parameter is None else parameter._version

    def written(self, parameter: nn.Parameter) -> bool:
        """Tell whether the parameter, which goes by the mark's name, has been written since."""
        followed = self.parameter is not None and self.parameter() is parameter
        if self.changed or (followed and self.version != parameter._version):
            return True
        # The layer may have been through bfloat16 and back, so equal means equal up to its rounding.
        return not torch.allclose(_sample(parameter).float(), self.sample.float(), rtol=2**-7, atol=1e-6)

    def __getstate__(self) -> dict[str, Any]:
        parameter = None if self.parameter is None else self.parameter()
        changed = self.changed if parameter is None else self.written(parameter)
        return {"parameter": parameter, "sample": self.sample, "changed": changed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._follow(state["parameter"])
        self.sample, self.changed = state["sample"], state["changed"]


def mark_random(layer: FFN) -> None:
    """Remember the present parameters as untrained."""
    layer.untrained = {name: _Mark(p) for name, p in layer.named_parameters() if p.numel() and not p.is_meta}


def is_random(layer: FFN) -> bool:
    """Tell whether the layer is as random as conversion left it."""
    marks = layer.untrained
    if layer.fitted != "random" or marks is None:
        return False
    # A compressed layer has fewer parameters: those that are left decide.
    return not any(name in marks and marks[name].written(p) for name, p in layer.named_parameters())


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


def _sample(parameter: nn.Parameter) -> torch.Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)].to("cpu", copy=True)
