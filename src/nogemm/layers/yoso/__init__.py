"""YOSO: hashed neurons, their values summed per bucket, read by the token's hashes."""

from nogemm.layers.yoso.config import YosoConfig
from nogemm.layers.yoso.layer import YosoFFN
from nogemm.layers.yoso.packed import PackedYoso

__all__ = ["PackedYoso", "YosoConfig", "YosoFFN"]
