"""Decode with a converted head: the tokens of the dense model, without its logits."""

from nogemm.decoding.generate import GenerationReport, generate

__all__ = ["GenerationReport", "generate"]
