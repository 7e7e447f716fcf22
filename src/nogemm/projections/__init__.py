"""Structured linear maps: what a layer hashes or routes with."""

from nogemm.projections._base import Projection
from nogemm.projections.bh import BHConfig, BHProjection
from nogemm.projections.dense import DenseProjection, DenseProjectionConfig

__all__ = ["BHConfig", "BHProjection", "DenseProjection", "DenseProjectionConfig", "Projection"]
