"""No FFN at all: a constant answer, the floor that every method must clear."""

from nogemm.layers.no.config import NoConfig
from nogemm.layers.no.layer import NoFFN
from nogemm.layers.no.packed import PackedNo

__all__ = ["NoConfig", "NoFFN", "PackedNo"]
