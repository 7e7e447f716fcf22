"""Vocabulary heads that find tokens in a part of their bytes."""

from nogemm.heads.codes import make_codes, second_moment
from nogemm.heads.config import HeadConfig
from nogemm.heads.layer import Choice, HireHead

__all__ = ["Choice", "HeadConfig", "HireHead", "make_codes", "second_moment"]
