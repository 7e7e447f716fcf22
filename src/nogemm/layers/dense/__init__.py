"""The dense FFN, gated or not: the baseline behind the same interface, at any width."""

from nogemm.layers.dense.config import DenseConfig
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.dense.packed import PackedDense

__all__ = ["DenseConfig", "DenseFFN", "PackedDense"]
