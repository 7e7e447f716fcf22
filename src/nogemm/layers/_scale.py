"""How large the answers of a freshly built layer are, whatever its shape."""

from __future__ import annotations

from functools import cache

import torch

from nogemm.activations import ACTIVATIONS

# Standard deviation of a freshly built layer's outputs for unit-variance inputs: what LookupFFN's reference
# initialisation gives at its main configuration (128 tables, 8 bits, BH4).
OUTPUT_STD = 0.14


@cache
def firing_energy(activation: str) -> float:
    """Return E[act(z)^2] for standard normal z, by quadrature."""
    with torch.device("cpu"):  # also while transformers builds a model on the meta device
        z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        density = torch.exp(-z.square() / 2)
        return float((ACTIVATIONS[activation](z).square() * density).sum() / density.sum())
