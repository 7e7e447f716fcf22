"""Vocabulary heads and FFNs whose rows lie on several ranks of torch.distributed: DA-TOP-k."""

from nogemm.distributed.exchange import Exchange, join
from nogemm.distributed.head import ShardedHead, TopTokens, shard_head
from nogemm.distributed.hire import ShardedHire, shard_hire
from nogemm.distributed.report import ShardReport

__all__ = [
    "Exchange",
    "ShardReport",
    "ShardedHead",
    "ShardedHire",
    "TopTokens",
    "join",
    "shard_head",
    "shard_hire",
]
