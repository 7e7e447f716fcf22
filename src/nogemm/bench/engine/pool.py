"""Tokens for timed calls: a file that every worker maps, larger than the caches, drawn from in order.

"Fresh" means that a timed call gets tokens that are in no cache: the pool is at least four times the last-level cache
where memory allows it, and each call takes the next tokens of it. The file is shared, so ten engines cost one pool.

Legend: N tokens, D width.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nogemm.hardware.cpu import last_level_cache_bytes

CAP_BYTES = 1_500_000_000
_BLOCK_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class PoolSize:
    """Say how large a pool is and why.

    Attributes:
        tokens: rows of the pool.
        bytes: of the pool.
        cache_bytes: of the last-level cache.
        note: why the pool is smaller than four times the cache, or "".
    """

    tokens: int
    bytes: int
    cache_bytes: int
    note: str

    def to_dict(self) -> dict[str, Any]:
        """Return the size as JSON-able values."""
        return dict(vars(self))


def pool_size(width: int, *, largest_call: int, cap_bytes: int = CAP_BYTES) -> PoolSize:
    """Choose a pool of min(4 * last-level cache, cap) bytes of float32 tokens, and at least two largest calls."""
    cache = last_level_cache_bytes()
    wanted = 4 * cache
    tokens = max(-(-min(wanted, cap_bytes) // (4 * width)), 2 * largest_call)
    size = 4 * width * tokens
    note = "" if size >= wanted else f"capped: {size / cache:.1f} times the last-level cache instead of 4"
    return PoolSize(tokens=tokens, bytes=size, cache_bytes=cache, note=note)


def write_pool(path: Path, tokens: int, width: int, *, seed: int, source_ND: Tensor | None = None) -> None:
    """Write `tokens` float32 rows: standard normal numbers, or rows drawn at random from `source_ND`.

    Raises:
        ValueError: if `source_ND` is not [N, width].
    """
    if source_ND is not None and (source_ND.ndim != 2 or source_ND.shape[1] != width):
        raise ValueError(f"expected source tokens [N, {width}], got {tuple(source_ND.shape)}")
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _BLOCK_BYTES // (4 * width))
    with path.open("wb") as file:
        for start in range(0, tokens, rows):
            count = min(rows, tokens - start)
            if source_ND is None:
                block = torch.randn(count, width, generator=generator)
            else:
                block = source_ND[torch.randint(len(source_ND), (count,), generator=generator)].float()
            file.write(block.contiguous().numpy().data)


class TokenPool:
    """Draw tokens from a pool file, in order and over again from its start.

    Args:
        path: as `write_pool` left it.
        width: of a token.
        dtype: tokens are drawn in; float32 is a view of the file, another dtype is cast once into own memory.
    """

    def __init__(self, path: Path, width: int, dtype: torch.dtype = torch.float32) -> None:
        size = os.path.getsize(path)
        with path.open("r+b") as file:
            # Pages are mapped now: a page fault inside a timed call would be charged to the engine.
            flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
            self._map = mmap.mmap(file.fileno(), size, flags=flags)
        tokens_ND = torch.frombuffer(self._map, dtype=torch.float32).view(-1, width)
        self.tokens_ND = tokens_ND if dtype == torch.float32 else tokens_ND.to(dtype)
        self._next = 0

    def draw(self, count: int) -> Tensor:
        """Return the next `count` tokens [count, D] as a view.

        Raises:
            ValueError: if the pool holds fewer.
        """
        if count > len(self.tokens_ND):
            raise ValueError(f"{count} tokens asked of a pool of {len(self.tokens_ND)}")
        if self._next + count > len(self.tokens_ND):
            self._next = 0
        start, self._next = self._next, self._next + count
        return self.tokens_ND[start : self._next]
