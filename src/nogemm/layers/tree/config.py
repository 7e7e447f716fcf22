"""The choices of a TreeFFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from nogemm.activations import ActivationName
from nogemm.config import LayerConfig, check_int, register
from nogemm.errors import ConfigError

if TYPE_CHECKING:
    from nogemm.layers.tree.layer import TreeFFN  # noqa: F401

Branch = Literal["sign", "bias"]
Routing = Literal["hard", "straight_through", "anneal"]
Balance = Literal["none", "loss", "bias"]
Init = Literal["scaled", "reference"]


@register
@dataclass(frozen=True, kw_only=True)
class TreeConfig(LayerConfig["TreeFFN"]):
    """Describes a TreeFFN; the defaults are the 1x11 of UltraFastBERT with an output bias.

    Attributes:
        trees: K, at least 1.
        depth: D from 0 to 20; a tree has 2^(D+1) - 1 nodes, of which a token visits D + 1.
        activation: None: that of the layer that is replaced if it is gelu, relu or silu; gelu otherwise.
        bias: a trainable bias in every node.
        out_bias: a trainable bias on the output (the published layer has none).
        branch: "sign" (a token goes right where z > 0, as published) or "bias" (where z > threshold, a number per
            node, so that a neuron can fire on both ways).
        routing: how directions learn besides through the firing of their neurons: "hard" (not at all, as published),
            "straight_through" (values as hard, gradients as if each step were weighted by its probability) or "anneal"
            (steps are weighted by their probability at first and by 1 after `anneal_steps` training steps).
        temperature: of that probability, sigmoid(abs(z - threshold) / temperature).
        balance: "none", "loss" (adds the gradient of a balance loss while training) or "bias" (moves the thresholds
            towards equal halves while training, without a gradient; needs branch="bias").
        balance_rate: weight of that loss, or step of the thresholds.
        core: neurons that every token visits besides.
        init: "scaled" (output scale independent of the shape) or "reference" (as published: normal, 0.02).
    """

    kind: ClassVar[str] = "tree"
    trees: int = 1
    depth: int = 11
    activation: ActivationName | None = None
    bias: bool = True
    out_bias: bool = True
    branch: Branch = "sign"
    routing: Routing = "hard"
    anneal_steps: int = 1000
    temperature: float = 1.0
    balance: Balance = "none"
    balance_rate: float = 0.01
    core: int = 0
    init: Init = "scaled"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("TreeConfig", "trees", self.trees, 1)
        check_int("TreeConfig", "depth", self.depth, 0, 20)
        check_int("TreeConfig", "core", self.core, 0)
        check_int("TreeConfig", "anneal_steps", self.anneal_steps, 1)
        if self.trees * (2 ** (self.depth + 1) - 1) >= 2**31:
            raise ConfigError(f"TreeConfig: too many nodes for 32-bit numbers: trees={self.trees}, depth={self.depth}")
        for name, value in (("temperature", self.temperature), ("balance_rate", self.balance_rate)):
            if value <= 0:
                raise ConfigError(f"TreeConfig: {name} must be a positive number, got {name}={value!r}")
        if self.balance == "bias" and self.branch != "bias":
            raise ConfigError('TreeConfig: balance="bias" moves thresholds, which needs branch="bias"')
