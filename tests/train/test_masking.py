"""Masked tokens: which are hidden, that the same batch hides the same, and a masked language model that learns."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from tiny_training import LOOKUP, WordTokenizer, make_texts, tiny_bert
from torch import nn

import nogemm
from nogemm.train import DistilOptions, DistilReport, distil
from nogemm.train.data import Batch
from nogemm.train.masking import SHARE, Masking

HIDE = Masking(mask_id=61, special=frozenset({1, 61}))


def train(model: nn.Module, teacher: nn.Module, tokenizer: WordTokenizer) -> DistilReport:
    options = DistilOptions(
        tokens=12_000, stage1_share=0.0, batch_tokens=256, max_length=16, lr_tables=1e-2, output="mlm"
    )
    return distil(model, teacher, make_texts(), tokenizer=tokenizer, bar=False, options=options)


def batch(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (40, 50), generator=generator)
    ids[:, 0] = 1
    mask = (torch.arange(50) < torch.randint(5, 51, (40, 1), generator=generator)).long()
    return Batch(ids * mask, mask)


def test_a_share_of_the_words_is_hidden() -> None:
    plain = batch()
    masked, hidden = HIDE.apply(plain)
    assert bool((masked.ids[hidden] == 61).all())
    assert torch.equal(masked.ids[~hidden], plain.ids[~hidden])
    assert not hidden[:, 0].any()
    assert not (hidden & (plain.mask == 0)).any()
    words = int(plain.mask[:, 1:].sum())
    assert abs(int(hidden.sum()) / words - SHARE) < 0.04


def test_the_same_batch_hides_the_same_words_and_another_seed_others() -> None:
    first, again, other = (Masking(61, HIDE.special, seed).apply(batch())[1] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, HIDE.apply(batch(1))[1])


def test_one_word_at_least_is_hidden_and_a_text_without_words_hides_none() -> None:
    one = Batch(torch.tensor([[1, 5]]), torch.ones(1, 2, dtype=torch.int64))
    assert HIDE.apply(one)[1].tolist() == [[False, True]]
    none = Batch(torch.tensor([[1, 1]]), torch.ones(1, 2, dtype=torch.int64))
    assert not HIDE.apply(none)[1].any()


class MaskTokenizer(WordTokenizer):
    mask_token_id = 61
    all_special_ids = (0, 1, 61)


def test_a_masked_language_model_learns_the_hidden_words() -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    teacher = BertForMaskedLM(cast("BertConfig", tiny_bert().config))
    model = copy.deepcopy(teacher)
    nogemm.convert(model, LOOKUP)
    report = train(model, teacher, MaskTokenizer())
    assert report.stages[0].last["output"] < 0.8 * report.stages[0].first["output"]


def test_what_mlm_needs_is_said() -> None:
    teacher = tiny_bert()
    model = copy.deepcopy(teacher)
    nogemm.convert(model, LOOKUP)
    with pytest.raises(nogemm.ConfigError, match="tokenizer with a mask token"):
        train(model, teacher, WordTokenizer())
    with pytest.raises(nogemm.ConfigError, match="a head that gives logits"):
        train(model, teacher, MaskTokenizer())
