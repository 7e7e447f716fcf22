"""HiRE: a cheap sketch names candidate neurons, only those are computed, and the strongest few answer."""

from nogemm.layers.hire.config import HireConfig
from nogemm.layers.hire.layer import HireFFN
from nogemm.layers.hire.packed import PackedHire

__all__ = ["HireConfig", "HireFFN", "PackedHire"]
