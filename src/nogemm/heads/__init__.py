"""Vocabulary heads that find tokens in a part of their bytes."""

from nogemm.heads.codes import make_codes, second_moment
from nogemm.heads.config import HeadConfig
from nogemm.heads.layer import Choice, HireHead, deferred_bytes, head_of, output_embeddings, searched_bytes

__all__ = [
    "Choice",
    "HeadConfig",
    "HireHead",
    "deferred_bytes",
    "head_of",
    "make_codes",
    "output_embeddings",
    "searched_bytes",
    "second_moment",
]
