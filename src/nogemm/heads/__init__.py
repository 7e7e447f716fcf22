"""Vocabulary heads that find tokens in a part of their bytes."""

from nogemm.heads.codes import check_head, codes_bytes, make_codes, second_moment
from nogemm.heads.config import HeadConfig
from nogemm.heads.layer import Choice, HireHead, deferred_bytes, head_of, output_embeddings, searched_bytes
from nogemm.heads.report import HeadReport

__all__ = [
    "Choice",
    "HeadConfig",
    "HeadReport",
    "HireHead",
    "check_head",
    "codes_bytes",
    "deferred_bytes",
    "head_of",
    "make_codes",
    "output_embeddings",
    "searched_bytes",
    "second_moment",
]
