"""HireFFNs of odd shapes: every activation, sketch and way to select; widths that no vector and no group divides."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nogemm.layers import HireConfig, HireFFN
from nogemm.shape import FFNShape


@dataclass(frozen=True)
class HireCase:
    """One layer to test."""

    name: str
    config: HireConfig
    activation: str
    gated: bool
    d_model: int = 40
    d_out: int = 33
    hidden: int = 103
    sparsity: float = 0.0


CASES = (
    HireCase("relu", HireConfig(keep=0.1), "relu", False),
    HireCase("relu2 int4", HireConfig(keep=0.1, sketch="int4"), "relu2", False, 67, 70, 130),
    HireCase("gelu", HireConfig(keep=0.2), "gelu", False),
    HireCase("gelu groups", HireConfig(keep=0.2, group=4, static=6), "gelu_new", False),
    HireCase("swiglu", HireConfig(keep=0.2, sketch="int4"), "silu", True, 64, 64, 200),
    HireCase("reglu static", HireConfig(keep=0.2, static=5), "relu", True),
    HireCase("drelu", HireConfig(keep=0.1, activation="drelu"), "relu", True),
    HireCase("quick gelu", HireConfig(keep=0.3), "quick_gelu", False),
    HireCase("low rank", HireConfig(keep=0.2, sketch="low_rank", rank=24), "relu", False),
    HireCase("statistical", HireConfig(keep=0.1, select="statistical"), "silu", True),
    HireCase("active", HireConfig(keep=0.1, select="active", sketch="int4"), "relu", False),
    HireCase("gaussian", HireConfig(keep=0.2, select="gaussian"), "gelu_new", True, sparsity=0.8),
    HireCase(
        "gaussian int4, plain", HireConfig(keep=0.1, select="gaussian", sketch="int4"), "relu", False, 65, 64, 200, 0.95
    ),
    HireCase("gaussian, no sketch", HireConfig(keep=1.0, select="gaussian"), "silu", True, 15, 9, 12, 0.5),
    HireCase("everything", HireConfig(keep=1.0), "gelu", False),
    HireCase("no sketch", HireConfig(keep=0.5, oversample=9.0, group=3), "relu", True),
    HireCase("one of everything", HireConfig(keep=0.5), "silu", False, 1, 1, 1),
)


def build_case(case: HireCase) -> HireFFN:
    """Build the layer in evaluation mode, with a fitted sketch and biases that matter."""
    layer = case.config.make(
        FFNShape(
            d_in=case.d_model,
            d_out=case.d_out,
            hidden=case.hidden,
            activation=case.activation,
            gated=case.gated,
            sparsity=case.sparsity,
        )
    )
    layer.fit_sketch()
    with torch.no_grad():
        for bias in (layer.up_bias, layer.gate_bias, layer.bias):
            if bias is not None:
                bias.normal_(std=0.3)
    return layer.eval().requires_grad_(False)
