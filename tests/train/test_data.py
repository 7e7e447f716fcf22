"""Token files and batches: whole epochs, bounded memory, exact positions."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_training import WordTokenizer, make_texts

from nogemm.train import Batches, DataError, TokenFile, tokenise
from nogemm.train.data import permuted


def token_file(directory: Path, source: list[str], max_length: int = 32) -> TokenFile:
    return tokenise(source, WordTokenizer(), directory, max_length=max_length, key={"data": "test"})


def batches_of(file: TokenFile, seed: int = 0, pool: int = 64, batch_tokens: int = 120) -> Batches:
    return Batches(file, batch_tokens=batch_tokens, seed=seed, pad_id=0, pool=pool)


def epoch(source: Batches) -> Iterator[list[tuple[int, ...]]]:
    start = source.position.epoch
    while source.position.epoch == start:
        batch = next(source)
        yield [tuple(row[mask.bool()].tolist()) for row, mask in zip(batch.ids, batch.mask, strict=True)]


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64, 1000, 4097])
def test_permuted_is_a_permutation_that_depends_on_its_seed(count: int) -> None:
    steps = np.arange(count)
    first = permuted(steps, count, seed=1)
    assert sorted(first.tolist()) == list(range(count))
    if count > 16:
        assert first.tolist() != permuted(steps, count, seed=2).tolist()
        assert first.tolist() != list(range(count))


def test_permuted_mixes_well() -> None:
    order = permuted(np.arange(4096), 4096, seed=3)
    assert abs(np.corrcoef(np.arange(4096), order)[0, 1]) < 0.1
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1


def test_an_epoch_holds_every_text_once_in_batches_of_bounded_size(tmp_path: Path) -> None:
    source = make_texts(300)
    file = token_file(tmp_path / "tokens", source)
    batches = batches_of(file)
    seen: Counter[tuple[int, ...]] = Counter()
    for rows in epoch(batches):
        assert len(rows) * max(map(len, rows)) <= 120
        seen.update(rows)
    expected = Counter(
        tuple(row) for row in WordTokenizer()(source, truncation=True, max_length=32, padding=False)["input_ids"]
    )
    assert seen == expected
    assert Counter(row for rows in epoch(batches) for row in rows) == expected


def test_batches_group_equal_lengths(tmp_path: Path) -> None:
    batches = batches_of(token_file(tmp_path / "tokens", make_texts(600)), pool=600)
    padding = [1 - batch.mask.float().mean().item() for batch in (next(batches) for _ in range(30))]
    assert np.mean(padding) < 0.06


def test_a_text_longer_than_a_batch_still_comes(tmp_path: Path) -> None:
    batches = batches_of(token_file(tmp_path / "tokens", ["word1 word2 word3 word4"]), batch_tokens=2)
    assert next(batches).tokens == 5


def test_position_restores_the_very_next_batch(tmp_path: Path) -> None:
    file = token_file(tmp_path / "tokens", make_texts(200))
    source = batches_of(file)
    for _ in range(37):
        next(source)
    state = source.state()
    expected = [next(source).ids for _ in range(40)]
    resumed = batches_of(file)
    resumed.load_state(state)
    for ids in expected:
        assert next(resumed).ids.equal(ids)
    other = batches_of(file, seed=1)
    other.load_state(state)
    assert not next(other).ids.equal(expected[0])


def test_texts_are_cut_and_the_token_file_is_reused(tmp_path: Path) -> None:
    file = token_file(tmp_path / "tokens", ["word1 " * 20], max_length=8)
    assert len(file.text(0)) == 8

    def must_not_be_read() -> Iterator[str]:
        raise AssertionError("read again")
        yield ""

    again = tokenise(must_not_be_read(), WordTokenizer(), tmp_path / "tokens", max_length=8, key={"data": "test"})
    assert again.text(0).tolist() == file.text(0).tolist()
    with pytest.raises(DataError, match="choose another directory"):
        tokenise(["word1"], WordTokenizer(), tmp_path / "tokens", max_length=8, key={"data": "other"})


def test_a_damaged_token_file_is_refused(tmp_path: Path) -> None:
    file = token_file(tmp_path / "tokens", make_texts(20))
    path = file.directory / "tokens.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="damaged"):
        TokenFile(tmp_path / "tokens")


def test_no_text_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        token_file(tmp_path / "tokens", [])
    assert list(tmp_path.iterdir()) == []


def test_an_endless_source_stops_at_the_budget(tmp_path: Path) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "word1 word2"

    file = tokenise(endless(), WordTokenizer(), tmp_path / "t", max_length=8, key={}, max_tokens=10_000)
    assert 10_000 <= len(file.tokens) < 14_000


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    def source(count: int) -> Iterator[str]:
        return ("word1 word2 word3 word4 word5" for _ in range(count))

    def peak(count: int) -> int:
        tracemalloc.start()
        file = tokenise(source(count), WordTokenizer(), tmp_path / str(count), max_length=8, key={})
        batches = Batches(file, batch_tokens=512, seed=0, pad_id=0, pool=256)
        for _ in range(20):
            next(batches)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small, large = peak(2_000), peak(40_000)
    assert large < 1.3 * small
