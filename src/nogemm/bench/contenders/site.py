"""The worker's side of the speed of a sparsity profile: a HireFFN of a model's own weights, read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nogemm.bench.contenders.layer import DenseContender, OurContender
from nogemm.layers import FFN, HireConfig, HireFFN
from nogemm.shape import FFNShape

MOST = 1 << 16  # tokens of a call: twelve layers take turns whatever their number, as in a model that runs a batch


class SiteDense(DenseContender):
    """A dense layer of the site's shape, twelve copies of it for every batch."""

    copied_batch = MOST


class SiteContender(OurContender):
    """A packed HireFFN of one site's weights, held against the unpacked one in float64.

    Settings: those of `OurContender` with "weights", a file of `store`, "config" and "shape", the fields of both.
    """

    copied_batch = MOST

    def _made(self, settings: dict[str, Any]) -> FFN:
        from safetensors.torch import load_file

        layer = HireConfig(**settings["config"]).make(FFNShape(**settings["shape"]))
        layer.load_state_dict(load_file(settings["weights"]))
        return layer.eval().requires_grad_(False)


def store(layer: HireFFN, file: Path) -> None:
    """Write a layer's weights and sketch for the workers."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in layer.state_dict().items()}, file)
