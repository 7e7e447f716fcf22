"""Contexts, masks, the held-out part, and tokenizers that are learnt from the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_runs import TEXTS, train
from tiny_training import make_texts

import nogemm
from nogemm.train.data import TokenFile, tokenise
from nogemm.train.lm.contexts import IGNORED, Contexts, Guessing, Joined
from nogemm.train.lm.corpus import is_held_out, is_hub_name, open_corpus
from nogemm.train.lm.options import train_options
from nogemm.train.lm.tokenizer import LEAST, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 290)


@pytest.fixture(scope="module")
def file(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    folder = tmp_path_factory.mktemp("data") / "tokens"
    return tokenise(iter(TEXTS), Joined(tokenizer), folder, max_length=0, key={})


def test_texts_become_one_stream(tokenizer, file: TokenFile) -> None:
    ends = np.flatnonzero(file.tokens == tokenizer.eos_token_id)
    assert len(ends) == len(TEXTS)
    assert tokenizer.decode(file.tokens[: ends[0]]) == TEXTS[0]
    assert tokenizer.decode(file.tokens[ends[0] + 1 : ends[1]]) == TEXTS[1]


def test_an_epoch_holds_every_context_once_and_each_epoch_has_its_order(file: TokenFile) -> None:
    contexts = Contexts(file, 18, seed=3, before=[7], after=[8])
    epochs = [contexts.rows(np.arange(e * contexts.count, (e + 1) * contexts.count)) for e in (0, 1)]
    assert contexts.count == len(file.tokens) // 16
    for rows in epochs:
        assert (rows[:, 0] == 7).all()
        assert (rows[:, -1] == 8).all()
        found = sorted(map(bytes, rows[:, 1:-1].astype(np.int32)))
        starts = range(len(file.tokens) - 16 * contexts.count + 1)
        whole = [np.asarray(file.tokens[s : s + 16 * contexts.count]).reshape(-1, 16) for s in starts]
        assert found in [sorted(map(bytes, rows)) for rows in whole]
    assert not np.array_equal(epochs[0], epochs[1])
    across = np.arange(contexts.count - 2, contexts.count + 2)
    assert np.array_equal(contexts.rows(across), np.concatenate([epochs[0][-2:], epochs[1][:2]]))
    assert not np.array_equal(Contexts(file, 18, seed=4).rows(across), contexts.rows(across))


def test_masks_are_fifteen_per_cent_and_of_three_kinds() -> None:
    guessing = Guessing(mask_id=4, vocabulary=1000, special=(0, 1, 2, 3, 4), share=0.15, seed=0)
    ids = np.random.default_rng(0).integers(5, 1000, (200, 128))
    ids[:, 0], ids[:, -1] = 0, 2
    batch = guessing.batch(ids, np.arange(200))
    inputs, labels = batch["input_ids"].numpy(), batch["labels"].numpy()
    guessed = labels != IGNORED
    assert (guessed.sum(1) == 19).all()
    assert (labels[guessed] == ids[guessed]).all()
    assert (inputs[~guessed] == ids[~guessed]).all()
    assert not guessed[:, 0].any()
    assert not guessed[:, -1].any()
    shares = [(inputs[guessed] == 4).mean(), (inputs[guessed] == ids[guessed]).mean()]
    assert shares == pytest.approx([0.8, 0.1], abs=0.03)
    again = guessing.batch(ids[50:60], np.arange(50, 60))
    assert again["labels"].equal(batch["labels"][50:60])  # by number, whatever batch it comes in
    assert not guessing.batch(ids[50:60], np.arange(10))["labels"].equal(again["labels"])


def test_special_tokens_are_guessed_where_nothing_else_is_left() -> None:
    guessing = Guessing(mask_id=4, vocabulary=9, special=(2, 4), share=0.5, seed=0)
    labels = guessing.batch(np.array([[2, 2, 2, 7, 2, 2, 2, 2]]), np.array([0]))["labels"]
    assert int((labels != IGNORED).sum()) == 4
    assert int(labels[0, 3]) == 7


def test_a_causal_model_guesses_the_next_token() -> None:
    batch = Guessing(None, 9, (), 0.15, 0).batch(np.array([[3, 4, 5]]), np.array([0]))
    assert batch["labels"].tolist() == [[4, 5, IGNORED]]
    assert batch["input_ids"].tolist() == [[3, 4, 5]]


def test_a_text_is_held_out_by_its_hash() -> None:
    texts = make_texts(2000, seed=5)
    out = [is_held_out(text, 0.2) for text in texts]
    assert 0.15 < np.mean(out) < 0.25
    assert out == [is_held_out(text, 0.2) for text in texts]
    assert not any(is_held_out(text, 0.0) for text in texts)
    assert all(is_held_out(text, 0.3) for text, held in zip(texts, out, strict=True) if held)


def test_validation_texts_are_not_trained_on(tokenizer, tmp_path: Path) -> None:
    options = train_options(steps=1, batch=2, context=16, validation_share=0.2)
    corpus = open_corpus(options, tmp_path, TEXTS, tokenizer=tokenizer)

    def texts(contexts: Contexts) -> set[str]:
        return {tokenizer.decode(contexts.file.text(i)[:-1]) for i in range(len(contexts.file))}

    assert texts(corpus.validation) == {text for text in TEXTS if is_held_out(text, 0.2)}
    assert not texts(corpus.train) & texts(corpus.validation)
    own = open_corpus(options, tmp_path / "own", TEXTS, TEXTS[:20], tokenizer=tokenizer)
    assert texts(own.validation) == set(TEXTS[:20])


def test_a_tokenizer_is_learnt_and_writes_every_text(tokenizer) -> None:
    assert len(tokenizer) == 290
    for text in (TEXTS[0], "Ünïcode  ☃ and\ttabs"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert len(tokenizer(TEXTS[0]).input_ids) < len(TEXTS[0].encode())
    first, last = tokenizer("a").input_ids[0], tokenizer("a").input_ids[-1]
    assert (first, last) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert train_tokenizer(TEXTS, 290, framed=False)("a").input_ids != tokenizer("a").input_ids
    assert train_tokenizer(TEXTS, 290).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(nogemm.ConfigError, match=f"at least {LEAST}, got size=100"):
        train_tokenizer(TEXTS, 100)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "no text"),
        (["a"], "leaves no text to validate on|learn a tokenizer"),
        (iter(TEXTS), "readable more than once"),
        ("nothing.txt", "no such data file"),
    ],
    ids=["empty", "one", "iterator", "file"],
)
def test_data_that_cannot_train_is_refused_in_a_sentence(data, said: str) -> None:
    with pytest.raises((nogemm.DataError, nogemm.ConfigError), match=said):
        train(data=data)


def test_data_of_less_than_a_batch_is_refused_in_a_sentence() -> None:
    with pytest.raises(nogemm.DataError, match=r"holds \d+ tokens .* 1 contexts of 64, and a batch takes 4"):
        train(data=TEXTS[:5], validation=TEXTS, context=64)
    with pytest.raises(nogemm.DataError, match=r"validation texts hold \d+ tokens, less than one context"):
        train(validation=["a"])


def test_a_data_set_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr("datasets.load_dataset", load)
    report = train(data="owner/name:small", steps=1).report
    assert report.data["source"] == "owner/name:small"
    assert set(map(str, asked)) == {str((("owner/name", "small"), {"split": "train", "streaming": True}))}

    def unknown(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("nobody answers")

    monkeypatch.setattr("datasets.load_dataset", unknown)
    with pytest.raises(nogemm.DataError, match=r"owner/name: no such file, .* cannot be opened: nobody answers"):
        train(data="owner/name", steps=1)


def test_a_model_without_a_mask_token_cannot_guess_masks(tokenizer) -> None:
    plain = train_tokenizer(TEXTS, 290)
    plain.mask_token = None
    with pytest.raises(nogemm.ConfigError, match="mask token"):
        train(tokenizer=plain)
    assert train(tokenizer=plain, task="clm", arch="llama", steps=1).report.steps == 1


def test_names_of_the_hub_are_told_from_files(tmp_path: Path) -> None:
    assert is_hub_name("owner/name")
    assert is_hub_name("owner/name:config")
    assert not is_hub_name("sample")
    assert not is_hub_name(f"{tmp_path}/texts.txt")
