"""Which rank holds which rows."""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.errors import ConfigError
from nogemm.ops.topk_recall import bucket_sizes


def deal(total: int, ranks: int, seed: int | None, what: str) -> list[Tensor]:
    """Deal rows to ranks, in numbers that differ by at most one.

    Dealt at random, the winners of a token spread over the ranks as the recall formula assumes. Vocabularies are sorted
    by frequency, so that contiguous shards would put most winners on one rank.

    Args:
        seed: of the deal, the same on all ranks; None: contiguous shards.
        what: the rows' name in an error.
    Returns:
        for each rank the numbers of its rows, int64, increasing.
    Raises:
        ConfigError: fewer rows than ranks.
    """
    if total < ranks:
        raise ConfigError(f"{total} {what} cannot be dealt to {ranks} ranks; start at most {total}")
    if seed is None:
        order = torch.arange(total)
    else:
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    return [rows.sort().values for rows in order.split(bucket_sizes(total, ranks))]
