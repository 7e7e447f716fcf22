"""Decode with a converted head: the tokens of the dense model, without its logits."""

from nogemm.decoding.generate import generate
from nogemm.decoding.windows import GenerationReport

__all__ = ["GenerationReport", "generate"]
