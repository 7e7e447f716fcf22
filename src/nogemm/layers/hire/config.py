"""The choices of a HireFFN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from nogemm.activations import ActivationName
from nogemm.config import LayerConfig, check_int, register
from nogemm.errors import ConfigError

if TYPE_CHECKING:
    from nogemm.layers.hire.layer import HireFFN  # noqa: F401

RELU_TYPES = ("relu", "relu2", "drelu")

SketchKind = Literal["int8", "int4", "low_rank"]
Select = Literal["topk", "statistical", "active", "gaussian"]


@register
@dataclass(frozen=True, kw_only=True)
class HireConfig(LayerConfig["HireFFN"]):
    """Describes a HireFFN layer.

    Attributes:
        keep: share of the neurons that answer, in (0, 1].
        sketch: "int8" or "int4" (of the weights themselves), or "low_rank".
        rank: of the low-rank sketch; None for a quarter of d_model.
        oversample: candidates computed exactly, as a multiple of what is kept, at least 1.
        group: neurons chosen together; a group is ranked by the sum of its members' absolute activations.
        static: neurons that are always computed (rounded up to whole groups); they are part of what is kept.
        select: "topk": the keep F largest absolute activations of a token. "statistical": all above mean + z std of the
            token's pre-activations, with z such that a normal distribution keeps `keep`. "active": all that are
            not zero, ReLU types only; `keep` is then the share that is expected. "gaussian": all above the cutoff that
            is the dense network's own (Gemma3n), found exactly from the weights' moments; `keep` as for "active".
        activation: replaces the dense layer's; "drelu" is ReLU on both branches of a gated layer.
    """

    kind: ClassVar[str] = "hire"
    keep: float = 0.05
    sketch: SketchKind = "int8"
    rank: int | None = None
    oversample: float = 1.5
    group: int = 1
    static: int = 0
    select: Select = "topk"
    activation: ActivationName | Literal["drelu"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, low in (("keep", self.keep, 0.0), ("oversample", self.oversample, 1.0)):
            if value < low:
                raise ConfigError(f"HireConfig: {name} must be at least {low:g}, got {name}={value!r}")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"HireConfig: keep must be above 0 and at most 1, got keep={self.keep!r}")
        if self.rank is not None:
            check_int("HireConfig", "rank", self.rank, 1)
        check_int("HireConfig", "group", self.group, 1)
        check_int("HireConfig", "static", self.static, 0)
        if self.select != "topk" and (self.group > 1 or self.static > 0):
            raise ConfigError(f'HireConfig: group and static need select="topk", got select={self.select!r}')
