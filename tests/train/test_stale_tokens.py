"""A run trains on the data it is given, not on tokens that an earlier run made of something else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tiny_training import WORDS, WordTokenizer, make_pair, make_texts

from nogemm.train import DataError, TokenFile, distil
from nogemm.train.distil import Run
from nogemm.train.identity import data_identity, file_identity, tokenizer_identity

OLD, NEW = make_texts(40, seed=1), make_texts(40, seed=2)


class OtherTokenizer(WordTokenizer):
    """The same words under other ids."""

    def get_vocab(self) -> dict[str, int]:
        return {word: len(WORDS) - i for i, word in enumerate(WORDS)}


def run(directory: Path, data: Any, tokenizer: Any = None, **changes: Any) -> None:
    pair = make_pair()
    chosen = {"tokens": 100, "batch_tokens": 64, "max_length": 16, **changes}
    distil(
        pair.model,
        pair.teacher,
        data,
        tokenizer=tokenizer or WordTokenizer(),
        bar=False,
        output_dir=directory,
        **chosen,
    )


def killed(directory: Path, data: Any, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Run until the tokens are there, and end before the first checkpoint."""

    def fail(*args: Any) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            run(directory, data, **changes)


def first_words(directory: Path) -> list[str]:
    return [WORDS[i - 2] for i in TokenFile(directory / "tokens").text(0)[1:]]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def same_time(path: Path, texts: list[str]) -> Path:
    """Write other content, and set the time of change back."""
    before = path.stat()
    write(path, texts)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return path


def test_corrected_data_is_what_the_next_run_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "texts.txt", OLD)
    killed(tmp_path / "run", data, monkeypatch)
    assert first_words(tmp_path / "run") == OLD[0].split()
    (tmp_path / "run" / "tokens.tmp-1").mkdir()  # of a run that ended while it tokenised
    write(data, NEW)
    run(tmp_path / "run", data)
    assert first_words(tmp_path / "run") == NEW[0].split()
    assert not list((tmp_path / "run").glob("*.tmp-*"))


def test_a_folder_that_is_not_of_tokens_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    mine = write(tmp_path / "validation" / "mine.txt", OLD)
    run(tmp_path, NEW)
    assert mine.is_file()


def test_resuming_with_data_that_changed_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "texts.txt", OLD)
    killed(tmp_path / "run", data, monkeypatch)
    same_time(data, [*OLD[:20], "word1 word2", *OLD[21:]])
    with pytest.raises(DataError, match=r"texts.txt has changed since: .*without resume, or choose another directory"):
        run(tmp_path / "run", data, resume=True)
    assert first_words(tmp_path / "run") == OLD[0].split()
    os.utime(write(data, OLD), (0, 0))  # the very content is the same data, whenever it was written
    run(tmp_path / "run", data, resume=True)


def test_resuming_with_another_list_or_tokenizer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(tmp_path, OLD, monkeypatch, validation=NEW)
    with pytest.raises(DataError, match="has changed since"):
        run(tmp_path, NEW, resume=True, validation=NEW)
    with pytest.raises(DataError, match=r"validation holds tokens .*has changed since"):
        run(tmp_path, OLD, resume=True, validation=OLD)
    with pytest.raises(DataError, match=r"\(tokenizer: .*OtherTokenizer"):
        run(tmp_path, OLD, OtherTokenizer(), resume=True, validation=NEW)
    run(tmp_path, list(OLD), resume=True, validation=NEW)


def test_a_large_file_goes_by_size_time_and_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "large.txt", OLD)

    def identity() -> dict[str, Any]:
        return file_identity(path, whole=100, end=20)

    before = identity()
    assert identity() == before
    same_time(path, ["word9", *OLD[1:]])
    assert identity() != before
    same_time(path, OLD)
    assert identity() == before
    os.utime(path, ns=(0, before["changed_ns"] + 1))
    assert identity() != before  # the time of change: what lies between the ends may be other
    assert file_identity(path) == file_identity(write(tmp_path / "copy.txt", OLD))  # a smaller one by content alone


def test_the_sample_has_an_identity_of_its_own() -> None:
    assert data_identity("sample", list)["content"]["bytes"] > 0


def test_tokenizers_differ_by_content_and_not_by_use(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    def make(words: list[str]) -> Any:
        backend = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
        backend.pre_tokenizer = Whitespace()  # type: ignore[assignment]
        return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")

    first, again, other = make(["a", "b"]), make(["a", "b"]), make(["b", "a"])
    first(["a b a"], truncation=True, max_length=2, padding=True)
    assert tokenizer_identity(first) == tokenizer_identity(again)
    assert tokenizer_identity(first) != tokenizer_identity(other)
    assert tokenizer_identity(WordTokenizer())["vocabulary"] == len(WordTokenizer())
