"""UltraFastBERT: walk the token down trees of neurons; only those on its way are computed."""

from nogemm.layers.tree.config import TreeConfig
from nogemm.layers.tree.layer import TreeFFN
from nogemm.layers.tree.packed import PackedTree

__all__ = ["PackedTree", "TreeConfig", "TreeFFN"]
