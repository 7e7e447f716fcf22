"""Structured linear maps: what a layer hashes or routes with."""

from nogemm.projections._base import Projection
from nogemm.projections.bh import BHConfig, BHProjection
from nogemm.projections.dense import DenseProjection, DenseProjectionConfig
from nogemm.projections.diagonal_chain import AcdcConfig, DiagonalChain, HadamardChainConfig, RandomHadamardConfig
from nogemm.projections.low_rank import LowRankConfig, LowRankProjection
from nogemm.projections.shuffle import ShuffleProjection, ShuffleProjectionConfig

__all__ = [
    "AcdcConfig",
    "BHConfig",
    "BHProjection",
    "DenseProjection",
    "DenseProjectionConfig",
    "DiagonalChain",
    "HadamardChainConfig",
    "LowRankConfig",
    "LowRankProjection",
    "Projection",
    "RandomHadamardConfig",
    "ShuffleProjection",
    "ShuffleProjectionConfig",
]
