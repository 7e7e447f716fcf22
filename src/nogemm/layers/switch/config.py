"""The choices of a Switch layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from nogemm.activations import ActivationName
from nogemm.config import (
    OPTIONAL_PROJECTION,
    LayerConfig,
    ProjectionConfig,
    check_int,
    check_projection,
    register,
)
from nogemm.errors import ConfigError

if TYPE_CHECKING:
    from nogemm.layers.switch.layer import SwitchFFN  # noqa: F401


@register
@dataclass(frozen=True, kw_only=True)
class SwitchConfig(LayerConfig["SwitchFFN"]):
    """Describes a Switch layer.

    Attributes:
        experts: E.
        hidden: F, width of each expert (None: as wide as the layer that is replaced).
        activation: of the experts (None: that of the layer that is replaced).
        capacity: in training, an expert takes at most ceil(capacity N / E) tokens of a call, the first ones; the others
            get 0 and pass through the residual. 1.25 is customary; None: no limit.
        evaluation_capacity: the same in evaluation, where a limit makes a token's answer depend on its neighbours.
        norm: RMSNorm inside the layer, before router and experts.
        projection: the router, E outputs. None: one matrix.
        balance_weight, z_weight: of the load-balancing loss and of the router's z-loss in every gradient.
        faithful: as in the published baseline: RMSNorm, ReLU experts and router without biases, inputs jittered in
            evaluation too, a dropout of hidden activations and of outputs in training, no auxiliary loss, no limit, and
            the input added to the output although the model adds it, too.
    """

    kind: ClassVar[str] = "switch"
    experts: int = 8
    hidden: int | None = None
    activation: ActivationName | None = None
    capacity: float | None = None
    evaluation_capacity: float | None = None
    norm: bool = False
    projection: ProjectionConfig | None = field(default=None, metadata=OPTIONAL_PROJECTION)
    balance_weight: float = 0.01
    z_weight: float = 0.001
    faithful: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("SwitchConfig", "experts", self.experts, 1)
        if self.hidden is not None:
            check_int("SwitchConfig", "hidden", self.hidden, 1)
        for name in ("capacity", "evaluation_capacity"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ConfigError(f"SwitchConfig: {name} must be above 0 or None, got {name}={value!r}")
            if value is not None and self.faithful:
                raise ConfigError(f"SwitchConfig: {name}={value!r} with faithful=True: the published limit never binds")
        for name in ("balance_weight", "z_weight"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"SwitchConfig: {name} must be at least 0, got {name}={value!r}")
        check_projection("SwitchConfig", self.projection, faithful=self.faithful, trained=True)
