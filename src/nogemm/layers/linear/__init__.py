"""One linear map: the rival that shows what the non-linearity of an FFN is worth."""

from nogemm.layers.linear.config import LinearConfig
from nogemm.layers.linear.layer import LinearFFN
from nogemm.layers.linear.packed import PackedLinear

__all__ = ["LinearConfig", "LinearFFN", "PackedLinear"]
