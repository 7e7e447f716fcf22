"""Tiny models, a word tokenizer and texts: whole training runs in seconds."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import nogemm
from nogemm.config import LayerConfig

WORDS = [f"word{i}" for i in range(60)]


class WordTokenizer:
    """Each word is one id; id 0 pads, id 1 starts a text."""

    pad_token_id = 0

    def __len__(self) -> int:
        return len(WORDS) + 2

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int, padding: bool) -> dict[str, Any]:
        assert truncation
        assert not padding
        known = {word: i + 2 for i, word in enumerate(WORDS)}
        return {"input_ids": [[1, *(known[w] for w in text.split())][:max_length] for text in texts]}


def apart(left: dict[str, Tensor], right: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Return how far two runs ended from one another, as a share of the way that the first went.

    Products on the way are torch's, so two equal runs need not end with equal bits.
    """
    assert left.keys() == right.keys() == start.keys()

    def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
        return sum(float((one[k].double() - other[k].double()).square().sum()) for k in one) ** 0.5

    return distance(left, right) / distance(left, start)


@dataclass
class Pair:
    """A dense teacher and a converted copy of it."""

    teacher: nn.Module
    model: nn.Module


def tiny_bert(seed: int = 0, layers: int = 2) -> nn.Module:
    """Make a BERT of width 32 with weights large enough that its FFNs matter."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=62,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return BertModel(config, add_pooling_layer=False)


def make_pair(config: LayerConfig | None = None) -> Pair:
    """Convert a copy of the tiny teacher."""
    teacher = tiny_bert()
    model = copy.deepcopy(teacher)
    torch.manual_seed(1)
    nogemm.convert(model, config or LOOKUP)
    return Pair(teacher, model)


LOOKUP = nogemm.LookupConfig(tables=8, bits=4, projection=nogemm.BHConfig(rounds=2, block=8))


def make_texts(count: int = 300, seed: int = 0) -> list[str]:
    """Make texts of 2 to 14 words with some structure: neighbours in the word list follow one another."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        length = int(torch.randint(2, 15, (1,), generator=generator))
        start = int(torch.randint(0, len(WORDS), (1,), generator=generator))
        steps = torch.randint(0, 4, (length,), generator=generator).cumsum(0)
        out.append(" ".join(WORDS[(start + int(s)) % len(WORDS)] for s in steps))
    return out
