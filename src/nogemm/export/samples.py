"""What a model's tokenizer makes: the graph's inputs, and batches that it is calibrated on and checked with.

Legend: B texts, L tokens per text.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.errors import ConfigError
from nogemm.models.texts import encode, padded

# Tensors [B, L] of whole numbers that a host is given, in the order of the graph's inputs.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# Texts and tokens that activation ranges are chosen on, and texts of a batch that the file is compared with torch on.
_TEXTS, _TOKENS, _BATCH = 64, 128, 8


def graph_inputs(model: nn.Module, tokenizer: Any = None) -> tuple[str, ...]:
    """Return the names of the tensors that the exported graph takes.

    They are what the tokenizer makes and the model's `forward` accepts; token_type_ids is none of them where the config
    counts one type of token, which is 0. Without a tokenizer, it is one where the config counts more.

    Raises:
        ConfigError: the model takes no input_ids and attention_mask, or the tokenizer makes something else for it.
    """
    taken = inspect.signature(model.forward).parameters
    config: Any = model.config
    if any(name not in taken for name in INPUTS[:2]) or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"export: {type(model).__name__} does not take input_ids and attention_mask alone")
    types = getattr(config, "type_vocab_size", None)
    if tokenizer is None:
        return INPUTS if INPUTS[2] in taken and (types or 0) > 1 else INPUTS[:2]
    made = [name for name in tokenizer.model_input_names if name in taken]
    if others := [name for name in made if name not in INPUTS]:
        raise ConfigError(
            f"export: the tokenizer makes {', '.join(others)} for {type(model).__name__}; a host is given only "
            f"{', '.join(INPUTS)}"
        )
    return INPUTS if INPUTS[2] in made and types != 1 else INPUTS[:2]


def text_batches(
    names: Sequence[str], tokenizer: Any, texts: Sequence[str], model: nn.Module
) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Return batches of tokens as the tokenizer makes them: of single texts, and of pairs of them."""
    texts = list(texts[:_TEXTS])
    others = [*texts[1:], texts[0]]
    starts = range(0, len(texts), _BATCH)

    def batch(start: int, pairs: bool) -> tuple[Tensor, ...]:
        chosen = slice(start, start + _BATCH)
        found = encode(tokenizer, texts[chosen], _TOKENS, model, text_pair=others[chosen] if pairs else None)
        rows = [{name: found[name][i] for name in found} for i in range(len(texts[chosen]))]
        inputs = padded(tokenizer, rows)
        inputs.setdefault(INPUTS[1], (inputs[INPUTS[0]] != tokenizer.pad_token_id).long())
        return tuple(inputs[name] for name in names)

    # Pairs are rarer than texts in most uses: every fourth batch, one at least.
    return [batch(start, False) for start in starts], [batch(start, True) for start in starts[::4]]


def random_batch(
    names: Sequence[str], vocabulary: int, types: int, shape: tuple[int, int] = (2, 16)
) -> tuple[Tensor, ...]:
    """Return a batch of random tokens: the last text shorter than the others, of two types where there are."""
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    mask, kinds = torch.ones_like(ids), torch.zeros_like(ids)
    mask[-1, shape[1] * 3 // 4 :] = 0
    kinds[:, shape[1] // 3 :] = min(1, types - 1)
    return tuple({INPUTS[0]: ids, INPUTS[1]: mask, INPUTS[2]: kinds}[name] for name in names)
