"""The choices of a LeafTreeFFN."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from nogemm.activations import ActivationName
from nogemm.config import LayerConfig, check_int, register
from nogemm.errors import ConfigError

if TYPE_CHECKING:
    from nogemm.layers.leaf_tree.layer import LeafTreeFFN  # noqa: F401

Routing = Literal["soft", "hard", "straight_through"]


@register
@dataclass(frozen=True, kw_only=True)
class LeafTreeConfig(LayerConfig["LeafTreeFFN"]):
    """Describes a LeafTreeFFN.

    Attributes:
        depth: D from 0 to 16; the tree has 2^D leaves.
        leaf_width: W, neurons in a leaf.
        activation: None: that of the layer that is replaced if it is gelu, relu or silu; gelu otherwise.
        routing: how leaves are mixed in training: "soft" (by their probabilities, as published), "hard" (the most
            probable way at each node; nodes learn nothing from the loss) or "straight_through" (values as hard,
            gradients as soft).
        harden: weight of the hardening loss, the mean entropy of the nodes' decisions, added while training.
        leak: probability, for each token and node, of swapping the two children while training ("region leak").
        balance: weight of the balance loss over leaves, added while training; 0 as published.
        master: neurons of a leaf that every token visits besides, mixed in by a learnt gate; 0 as published.
    """

    kind: ClassVar[str] = "leaf_tree"
    depth: int = 3
    leaf_width: int = 8
    activation: ActivationName | None = None
    routing: Routing = "soft"
    harden: float = 0.1
    leak: float = 0.0
    balance: float = 0.0
    master: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("LeafTreeConfig", "depth", self.depth, 0, 16)
        check_int("LeafTreeConfig", "leaf_width", self.leaf_width, 1)
        check_int("LeafTreeConfig", "master", self.master, 0)
        for name, most in (("harden", math.inf), ("balance", math.inf), ("leak", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
                raise ConfigError(f"LeafTreeConfig: {name} must lie between 0 and {most}, got {name}={value!r}")
