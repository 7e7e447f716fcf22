"""MONGOOSE: SLIDE with hashes that are learned."""

from nogemm.layers.mongoose.config import MongooseConfig
from nogemm.layers.mongoose.layer import MongooseFFN

__all__ = ["MongooseConfig", "MongooseFFN"]
