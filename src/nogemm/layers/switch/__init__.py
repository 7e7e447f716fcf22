"""Switch: a router sends each token to one of a few dense experts."""

from nogemm.layers.switch.config import SwitchConfig
from nogemm.layers.switch.layer import SwitchFFN
from nogemm.layers.switch.packed import PackedSwitch

__all__ = ["PackedSwitch", "SwitchConfig", "SwitchFFN"]
