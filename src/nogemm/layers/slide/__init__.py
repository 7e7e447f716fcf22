"""SLIDE: random hash tables over the neurons; a token computes those that it collides with."""

from nogemm.layers.slide.config import SlideConfig
from nogemm.layers.slide.layer import SlideFFN

__all__ = ["SlideConfig", "SlideFFN"]
