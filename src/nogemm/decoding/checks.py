"""What `generate` is given, held against what it can take; the same for every engine.

Legend: B sequences, L tokens of the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nogemm.errors import ConfigError

_PADDING = "attention_mask must be like input_ids, 0 for the padding on the left and then 1"


def check_prompt(ids: object, mask: object, count: object, rows: int, limit: int | None) -> Tensor | None:
    """Check prompts and the number of new tokens.

    Args:
        rows: of the embedding.
        limit: positions that the model has; None or 0: it does not say.
    Returns:
        the mask, int64 [B, L], or None where no prompt is padded.
    Raises:
        ConfigError: one of them is out of range, or together they are longer than the model's positions.
    """
    if not isinstance(ids, Tensor):
        raise ConfigError(f"generate: input_ids must be a tensor int64 [B, L], got {type(ids).__name__}")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise ConfigError(f"generate: input_ids must be int64 or int32 [B, L], got {ids.dtype} {tuple(ids.shape)}")
    if ids.shape[0] < 1:
        raise ConfigError("generate: input_ids holds no sequence")
    if ids.shape[1] < 1:
        raise ConfigError("generate: the prompt is empty; give at least the token that begins a text")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"generate: max_new_tokens must be an integer of at least 0, got {count!r}")
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise ConfigError(f"generate: input_ids must be from 0 to {rows - 1}, got {int(ids.min())} to {int(ids.max())}")
    if limit and limit > 0 and ids.shape[1] + count > limit:
        raise ConfigError(
            f"generate: {ids.shape[1]} tokens and max_new_tokens={count} are more than the model's {limit} positions"
        )
    return None if mask is None else _checked_mask(mask, ids)


def _checked_mask(mask: object, ids: Tensor) -> Tensor | None:
    if not isinstance(mask, Tensor):
        raise ConfigError(f"generate: attention_mask must be a tensor like input_ids, got {type(mask).__name__}")
    ones = mask.shape == ids.shape and bool(((mask == 0) | (mask == 1)).all()) and bool((mask[:, -1] == 1).all())
    if not ones or bool((mask[:, 1:].long() < mask[:, :-1].long()).any()):
        raise ConfigError(f"generate: {_PADDING}")
    return None if bool(mask.all()) else mask.long()
