"""From texts to a model's inputs: the padding token, how long a text may be, and which inputs a model takes.

Every command comes through here: conversion, training, evaluation, benches and export.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.errors import ConfigError
from nogemm.models.inner import inner_model


def prepare_tokenizer(tokenizer: Any, model: nn.Module | None = None) -> Any:
    """Give a tokenizer without a padding token one, and let a model without a padding id know it; return the tokenizer.

    GPT-2 and others come without one. The end-of-text token takes the part: the attention mask hides padding, so any
    token would do. A classifier that looks for a text's last token needs the id in its config, too.

    Raises:
        ConfigError: there is no end-of-text token either.
    """
    if getattr(tokenizer, "pad_token", "") is None:
        if tokenizer.eos_token is None:
            raise ConfigError(
                f"{type(tokenizer).__name__} has neither a padding nor an end-of-text token: set tokenizer.pad_token"
            )
        tokenizer.pad_token = tokenizer.eos_token
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = getattr(tokenizer, "pad_token_id", None)
    return tokenizer


def longest_text(wanted: int, tokenizer: Any = None, model: nn.Module | None = None) -> int:
    """Return how many tokens a text may have: the least of what is wanted, the tokenizer's and the positions' limit."""
    limits = [wanted, getattr(tokenizer, "model_max_length", None), None if model is None else positions(model)]
    return min(int(limit) for limit in limits if limit is not None)


def positions(model: nn.Module) -> int | None:
    """Return how many positions a model has; None where nothing limits them (T5, BLOOM).

    RoBERTa and its family number positions from behind the padding index, so they have that many fewer than rows.
    """
    model = inner_model(model)
    config = getattr(model, "config", None)
    rows = getattr(config, "max_position_embeddings", None)
    if rows is None:  # a model of texts and images keeps the text's part apart
        rows = getattr(getattr(config, "text_config", None), "max_position_embeddings", None)
    if not isinstance(rows, int) or rows <= 0:
        return None
    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, nn.Embedding) and table.padding_idx is not None:
            return rows - table.padding_idx - 1
    return rows


def encode(
    tokenizer: Any, texts: Sequence[str], max_length: int, model: nn.Module | None = None, **choices: Any
) -> Mapping[str, Any]:
    """Tokenise texts, cut to what tokenizer and model allow; without padding unless `choices` ask for it."""
    length = longest_text(max_length, tokenizer, model)
    return tokenizer(list(texts), truncation=True, max_length=length, **choices)


def padded(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad tokenised texts behind their ends to one batch [B, L].

    Behind, whatever the tokenizer does for generation: absolute positions then start at each text's first token.
    """
    return dict(prepare_tokenizer(tokenizer).pad(list(rows), padding_side="right", return_tensors="pt"))


def batch_of(tokenizer: Any, texts: Sequence[str], max_length: int, model: nn.Module) -> dict[str, Tensor]:
    """Tokenise texts to one padded batch of those inputs that the model takes."""
    found = encode(tokenizer, texts, max_length, model)
    rows = [{name: found[name][i] for name in found} for i in range(len(texts))]
    return accepted(model, padded(tokenizer, rows))


def accepted(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what a tokenizer gives and the model's forward does not name, such as token types for DistilBERT."""
    named = inspect.signature(inner_model(model).forward).parameters
    if "input_ids" not in named:
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name in named}


def last_hidden(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return an encoder's last hidden states, [B, L, D]; of an encoder-decoder, its encoder's."""
    inner: Any = inner_model(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        inner = inner.get_encoder()
    output = inner(**accepted(inner, inputs))
    if not isinstance(getattr(output, "last_hidden_state", None), torch.Tensor):
        raise ConfigError(f"{type(inner).__name__} gives no last hidden states to make an embedding of")
    return output.last_hidden_state
