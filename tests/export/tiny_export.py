"""A tiny converted encoder, the words it knows, and texts of them."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import BertConfig, BertModel

import nogemm
from nogemm.layers import LookupFFN

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(40))]
TEXTS = [" ".join(WORDS[5 + (7 * i + j * j) % 40] for j in range(3 + i % 9)) for i in range(24)]
LOOKUP = nogemm.LookupConfig(tables=8, bits=4, projection=nogemm.BHConfig(rounds=2, block=16))


def build(config: Any = LOOKUP) -> Any:
    """Convert a tiny BERT; tables hold values as large as a trained layer's, and nothing counts as random."""
    torch.manual_seed(0)
    dense = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertModel(dense).eval()
    nogemm.convert(model, config)
    for layer in nogemm.converted(model).values():
        layer.fitted = "distilled"
        if isinstance(layer, LookupFFN):
            with torch.no_grad():
                layer.tables.normal_(std=0.3)
    return model
