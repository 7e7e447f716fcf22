"""How long a text may be, padding, and which inputs a model takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from nogemm.errors import ConfigError
from nogemm.models.texts import accepted, last_hidden, longest_text, padded, positions, prepare_tokenizer

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 40,
}
DISTIL: dict[str, Any] = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64}
BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "vocab_size": 64,
}
T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 64}


class Words:
    """As much of a tokenizer as is asked for."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (tf.BertConfig(**SMALL), 40),
        (tf.RobertaConfig(**SMALL, pad_token_id=1), 38),
        (tf.MPNetConfig(**SMALL, pad_token_id=1), 38),
        (tf.DistilBertConfig(**DISTIL, max_position_embeddings=40), 40),
        (tf.GPT2Config(n_embd=16, n_inner=32, n_layer=1, n_head=2, vocab_size=64, n_positions=40), 40),
        (tf.CLIPTextConfig(**SMALL), 40),
        (tf.BartConfig(**BART, max_position_embeddings=40), 40),
        (tf.T5Config(**T5), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_positions_are_all_that_the_model_computes(config: Any, expected: int | None) -> None:
    model = tf.AutoModel.from_config(config).eval()
    assert positions(model) == expected
    length = expected or 600
    ids = torch.full((1, length), 5)
    with torch.no_grad():
        assert last_hidden(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}).shape == (1, length, 16)
    if expected is not None:  # and not one more
        more = torch.full((1, expected + 1), 5)
        with pytest.raises((RuntimeError, IndexError, ValueError)), torch.no_grad():
            last_hidden(model, {"input_ids": more, "attention_mask": torch.ones_like(more)})


def test_the_least_limit_counts() -> None:
    model = tf.AutoModel.from_config(tf.BertConfig(**SMALL))
    assert longest_text(128) == 128
    assert longest_text(128, Words()) == 128
    assert longest_text(128, Words(model_max_length=77), model) == 40
    assert longest_text(128, Words(model_max_length=30), model) == 30
    assert longest_text(8, Words(model_max_length=10**30), model) == 8


def test_padding_takes_the_end_of_text_token() -> None:
    model = tf.GPT2Model(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=8, n_positions=8))
    found = prepare_tokenizer(Words(pad_token=None, eos_token="end", pad_token_id=7), model)
    assert found.pad_token == "end"
    assert model.config.pad_token_id == 7
    assert prepare_tokenizer(Words(pad_token="pad", eos_token="end")).pad_token == "pad"
    with pytest.raises(ConfigError, match=r"set tokenizer\.pad_token"):
        prepare_tokenizer(Words(pad_token=None, eos_token=None))


def test_padding_stands_behind_whatever_the_tokenizer_prefers() -> None:
    from tokenizers import Tokenizer, models

    plain = Tokenizer(models.WordLevel({"end": 0, "a": 1}, unk_token="end"))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="end", padding_side="left")
    rows = [{"input_ids": [1, 1], "attention_mask": [1, 1]}, {"input_ids": [1], "attention_mask": [1]}]
    assert padded(tokenizer, rows)["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert tokenizer.padding_side == "left"


def test_inputs_that_the_model_does_not_name_are_left_out() -> None:
    inputs = {name: torch.zeros(1, 1) for name in ("input_ids", "token_type_ids", "attention_mask")}
    assert set(accepted(tf.DistilBertModel(tf.DistilBertConfig(**DISTIL)), inputs)) == {"input_ids", "attention_mask"}
    assert set(accepted(tf.BertModel(tf.BertConfig(**SMALL)), inputs)) == set(inputs)
