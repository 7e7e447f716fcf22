"""The choices that SLIDE and MONGOOSE share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from nogemm.activations import ActivationName
from nogemm.config import (
    OPTIONAL_PROJECTION,
    LayerConfig,
    LayerT,
    ProjectionConfig,
    check_int,
    check_projection,
)


@dataclass(frozen=True, kw_only=True)
class HashedConfig(LayerConfig[LayerT]):
    """What SLIDE and MONGOOSE layers have in common.

    Attributes:
        bits: K, from 1 to 16; more bits retrieve fewer neurons.
        tables: T; more tables retrieve more.
        chunk: consecutive tokens that share their neurons; 1: a token's answer does not depend on its neighbours.
        hidden: F (None: that of the layer that is replaced).
        activation: None: that of the layer that is replaced.
        norm: LayerNorm inside the layer.
        projection: what hashes in place of the planes, M = T K outputs; its bias stands for the last plane, without one
            hashes leave the neurons' biases out. None: planes.
        faithful: as published, see the layer; also the start, N(0, 0.02^2) and +-1/sqrt(F) for the second matrix.
    """

    bits: int = 6
    tables: int = 16
    chunk: int = 1
    hidden: int | None = None
    activation: ActivationName | None = None
    norm: bool = False
    projection: ProjectionConfig | None = field(default=None, metadata=OPTIONAL_PROJECTION)
    faithful: bool = False
    learned: ClassVar[bool] = False  # whether the hashes are

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_int(owner, "bits", self.bits, 1, 16)
        check_int(owner, "tables", self.tables, 1)
        check_int(owner, "chunk", self.chunk, 1)
        if self.hidden is not None:
            check_int(owner, "hidden", self.hidden, 1)
        check_projection(owner, self.projection, faithful=self.faithful, trained=self.learned)
