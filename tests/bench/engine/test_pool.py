"""Fresh tokens are fresh: in order, over again from the start, larger than the cache unless it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nogemm.bench.engine.pool import TokenPool, pool_size, write_pool
from nogemm.hardware.cpu import last_level_cache_bytes


def test_tokens_come_in_order_and_start_over(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", 10, 4, seed=1)
    pool = TokenPool(tmp_path / "pool", 4)
    whole = pool.tokens_ND.clone()
    assert torch.equal(pool.draw(4), whole[:4])
    assert torch.equal(pool.draw(4), whole[4:8])
    assert torch.equal(pool.draw(4), whole[:4])
    with pytest.raises(ValueError, match="11 tokens asked of a pool of 10"):
        pool.draw(11)


def test_a_draw_is_a_view_of_the_file(tmp_path: Path) -> None:
    write_pool(tmp_path / "pool", 10, 4, seed=1)
    pool = TokenPool(tmp_path / "pool", 4)
    assert pool.draw(2).data_ptr() == pool.tokens_ND.data_ptr()


def test_same_seed_same_tokens_any_dtype(tmp_path: Path) -> None:
    write_pool(tmp_path / "a", 100, 8, seed=5)
    write_pool(tmp_path / "b", 100, 8, seed=5)
    narrow = TokenPool(tmp_path / "b", 8, torch.bfloat16)
    assert narrow.draw(100).dtype == torch.bfloat16
    assert torch.equal(TokenPool(tmp_path / "a", 8).draw(100).bfloat16(), narrow.tokens_ND)


def test_tokens_are_drawn_from_a_source(tmp_path: Path) -> None:
    source = torch.arange(12.0).reshape(3, 4)
    write_pool(tmp_path / "pool", 50, 4, seed=0, source_ND=source)
    drawn = TokenPool(tmp_path / "pool", 4).draw(50)
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in source.tolist()}
    with pytest.raises(ValueError, match=r"expected source tokens \[N, 5\]"):
        write_pool(tmp_path / "pool", 50, 5, seed=0, source_ND=source)


def test_pool_is_four_caches_or_says_why_not() -> None:
    cache = last_level_cache_bytes()
    full = pool_size(256, largest_call=10, cap_bytes=8 * cache)
    assert full.bytes >= 4 * cache
    assert full.note == ""
    capped = pool_size(256, largest_call=10, cap_bytes=cache)
    assert capped.bytes < 2 * cache
    assert capped.note == "capped: 1.0 times the last-level cache instead of 4"
    assert pool_size(256, largest_call=10**7, cap_bytes=cache).tokens == 2 * 10**7
