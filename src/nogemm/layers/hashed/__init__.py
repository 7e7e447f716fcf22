"""What SLIDE and MONGOOSE share: neurons in hash tables."""

from nogemm.layers.hashed.config import HashedConfig
from nogemm.layers.hashed.layer import HashedNeurons
from nogemm.layers.hashed.packed import PackedHashedNeurons

__all__ = ["HashedConfig", "HashedNeurons", "PackedHashedNeurons"]
