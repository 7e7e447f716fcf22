"""Channel shuffle: two block-diagonal matrices with a fixed permutation between."""

from nogemm.layers.shuffle.config import ShuffleConfig
from nogemm.layers.shuffle.layer import ShuffleFFN
from nogemm.layers.shuffle.packed import PackedShuffle

__all__ = ["PackedShuffle", "ShuffleConfig", "ShuffleFFN"]
