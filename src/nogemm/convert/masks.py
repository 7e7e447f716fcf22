"""Fill masked tokens by a converted head, which is asked for those alone.

Legend: B sequences, L tokens, M masked tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.head import find_head
from nogemm.errors import ConfigError
from nogemm.heads import Choice
from nogemm.models.inner import inner_model


def fill_mask(
    model: nn.Module, input_ids: Tensor, mask_token_id: int, *, attention_mask: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, Choice]:
    """Put the most likely token in the place of each mask; the head computes no logits of the other places.

    A masked model's own forward multiplies the whole head with every state, converted or not. Here the head gets the
    masked states alone: proven tokens in the modes "exact" and "deferred", searched ones in the others.

    Args:
        model: a masked language model of transformers in evaluation mode, its head by `nogemm.convert_head`.
        input_ids: int64 [B, L].
        mask_token_id: the token that is filled.
        attention_mask: [B, L]; inputs: further keyword arguments of the model.
    Returns:
        ids int64 [B, L], the masks replaced, and the `Choice` of the M masks, in order of reading.
    Raises:
        ConfigError: the head is dense, the model is in training mode, or its head does not get a state for each token.
        NotFiniteError: the state of a mask is not finite; the message names which mask.
    Cost: the model without its head, and `head_argmax` or `head_search` of M states.
    """
    inner: Any = inner_model(model)
    head = find_head(inner)
    if head is None:
        raise ConfigError("fill_mask: the model's head is dense; call nogemm.convert_head(model) first")
    if inner.training:
        raise ConfigError("fill_mask: the model is in training mode; call model.eval() first")
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
    filled[masked] = choice.token
    return filled, choice
