"""Text as it grows: the pieces are the text, no half characters, nothing of a string that ends it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import transformers as tf

from nogemm.serve.pieces import TextPieces

TEXT = 'Straße, 東京 and 🦉🦉 say "né" — twice.\n\n  Indented, naïve: 1,000.00 €'


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens, some of them merged: a character may take several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=made)


def pieces(tokenizer: Any, prompt: list[int], ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    found = TextPieces(tokenizer, prompt, stops)
    parts = []
    for token in ids:
        parts.append(found.add(token))
        if found.ended:
            break
    return [*parts, found.end()], found.ended


@pytest.mark.parametrize("cut", [0, 1, 7, 30])
def test_pieces_are_the_text_behind_the_prompt(tokenizer: Any, cut: int) -> None:
    ids = tokenizer(TEXT).input_ids
    parts, ended = pieces(tokenizer, ids[:cut], ids[cut:])
    assert tokenizer.decode(ids[:cut]) + "".join(parts) == TEXT
    assert not ended
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)
    assert len([part for part in parts if part]) > 20


def test_half_a_character_at_the_end_is_shown_as_one(tokenizer: Any) -> None:
    ids = [token for byte in "🦉".encode()[:2] for token in [tokenizer.convert_tokens_to_ids(_shown(byte))]]
    assert pieces(tokenizer, [], ids)[0] == ["", "", "\N{REPLACEMENT CHARACTER}"]


def _shown(byte: int) -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return bytes_to_unicode()[byte]


def test_a_stop_ends_the_text_and_is_no_part_of_it(tokenizer: Any) -> None:
    chance = random.Random(0)
    ids = tokenizer(TEXT).input_ids
    for _ in range(60):
        first = chance.randrange(len(TEXT) - 6)
        stops = (TEXT[first : first + chance.randint(1, 6)], "never there")
        parts, ended = pieces(tokenizer, [], ids, stops)
        assert ended
        assert "".join(parts) == TEXT[: TEXT.index(stops[0])]


def test_the_beginning_of_a_stop_is_held_back_and_comes_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("one two").input_ids
    parts, ended = pieces(tokenizer, [], ids, ("two three",))
    assert ("".join(parts), ended) == ("one two", False)
    assert parts[-1] == "two"
