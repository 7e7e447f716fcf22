"""A token table: one learned answer for each token id, read and not computed."""

from nogemm.layers.token_table.config import TokenTableConfig
from nogemm.layers.token_table.ids import given
from nogemm.layers.token_table.layer import TokenTableFFN
from nogemm.layers.token_table.packed import PackedTokenTable

__all__ = ["PackedTokenTable", "TokenTableConfig", "TokenTableFFN", "given"]
