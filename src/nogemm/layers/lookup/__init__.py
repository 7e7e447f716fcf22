"""LookupFFN: hash the token, read one row of each table, add the rows up."""

from nogemm.layers.lookup.config import LookupConfig
from nogemm.layers.lookup.layer import LookupFFN
from nogemm.layers.lookup.packed import PackedLookup

__all__ = ["LookupConfig", "LookupFFN", "PackedLookup"]
