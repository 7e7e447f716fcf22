"""A sum of layers on the same input, such as a narrow dense core and look-ups for the rest."""

from nogemm.layers.sum.config import SumConfig
from nogemm.layers.sum.layer import SumFFN
from nogemm.layers.sum.packed import PackedSum

__all__ = ["PackedSum", "SumConfig", "SumFFN"]
