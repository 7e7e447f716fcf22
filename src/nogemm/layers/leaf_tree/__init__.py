"""Fast feedforward: a tree chooses a small MLP, its leaf, for each token."""

from nogemm.layers.leaf_tree.config import LeafTreeConfig
from nogemm.layers.leaf_tree.layer import LeafTreeFFN
from nogemm.layers.leaf_tree.packed import PackedLeafTree

__all__ = ["LeafTreeConfig", "LeafTreeFFN", "PackedLeafTree"]
