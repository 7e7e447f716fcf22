"""Fill masked tokens by a converted head, which is asked for those alone.

Legend: B sequences, L tokens, M masked tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nogemm.config import check_int
from nogemm.convert.head import find_head
from nogemm.errors import ConfigError
from nogemm.heads import Choice
from nogemm.models.inner import inner_model
from nogemm.models.texts import positions


def fill_mask(
    model: nn.Module, input_ids: Tensor, mask_token_id: int, *, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Choice]:
    """Put the most likely token in the place of each mask; the head computes no logits of the other places.

    A masked model's own forward multiplies the whole head with every state, converted or not. Here the head gets the
    masked states alone: proven tokens in the modes "exact" and "deferred", searched ones in the others.

    Args:
        model: a masked language model of transformers in evaluation mode, its head by `nogemm.convert_head`.
        input_ids: int64 [B, L]; int32 is taken, too.
        mask_token_id: the token that is filled; where no place has it, nothing is done but the model's run.
        attention_mask: [B, L] of 0 and 1; inputs: further keyword arguments of the model but labels.
    Returns:
        ids int64 [B, L], the masks replaced, and the `Choice` of the M masks, in order of reading.
    Raises:
        ConfigError: the head is dense, the model is in training mode, or its head does not get a state for each token;
            tokens or mask are none of the model's, or too many for its positions.
        NotFiniteError: the state of a mask is not finite; the message names which mask.
    Cost: the model without its head, and `head_argmax` or `head_search` of M states; one pass over the head, which
        notices weights that were changed behind torch's back.
    """
    inner: Any = inner_model(model)
    head = find_head(inner)
    if head is None:
        raise ConfigError("fill_mask: the model's head is dense; call nogemm.convert_head(model) first")
    if inner.training:
        raise ConfigError("fill_mask: the model is in training mode; call model.eval() first")
    if "labels" in inputs:
        raise ConfigError("fill_mask: labels are for training; the tokens of the masks are returned, no loss")
    check_tokens(inner, input_ids, mask_token_id, attention_mask)
    head.refresh()
    seen: list[Tensor] = []

    def take(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(given[0])
        return (given[0][..., :0, :],)  # logits of no token

    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    hook = head.register_forward_pre_hook(take)
    try:
        with torch.inference_mode():
            inner(input_ids=input_ids, **inputs)
    finally:
        hook.remove()
    if len(seen) != 1 or seen[0].shape[:-1] != input_ids.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in seen) or "none"
        raise ConfigError(
            f"fill_mask: the head of {type(inner).__name__} gets no state for each token of input_ids "
            f"{tuple(input_ids.shape)} (states: {shapes})"
        )
    masked = input_ids == mask_token_id
    states_MD = seen[0][masked]
    choice = head.search(states_MD) if head.config.approximate else head.choose(states_MD)
    filled = input_ids.clone()
    filled[masked] = choice.token.to(filled.dtype)
    return filled, choice


def check_tokens(inner: Any, ids: object, token: object, mask: object) -> None:
    """Check what the model would answer with an error of torch, or would take without a word."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32):
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ConfigError(f"fill_mask: input_ids must be int64 or int32 [B, L], got {got}")
    if not ids.numel():
        raise ConfigError(f"fill_mask: input_ids holds no token, its shape is {tuple(ids.shape)}")
    rows = inner.get_input_embeddings().weight.shape[0]
    check_int("fill_mask", "mask_token_id", token, 0, rows - 1)
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise ConfigError(
            f"fill_mask: input_ids must be from 0 to {rows - 1}, got {int(ids.min())} to {int(ids.max())}"
        )
    limit = positions(inner)
    if limit is not None and ids.shape[1] > limit:
        raise ConfigError(f"fill_mask: texts of {ids.shape[1]} tokens are longer than the model's {limit} positions")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.shape != ids.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise ConfigError("fill_mask: attention_mask must be like input_ids, 1 for tokens and 0 for padding")
    if not bool((mask == 1).any(1).all()):
        raise ConfigError("fill_mask: a sequence is padding alone by attention_mask")
