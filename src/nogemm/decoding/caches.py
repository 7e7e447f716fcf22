"""Caches of transformers: going back to where one was, after a token that is taken back or an interruption.

Legend: B sequences, L tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ConfigError

# Layers that can go back by any number of tokens, because they replace their keys and values by longer ones.
REWINDABLE = ("DynamicLayer", "DynamicSlidingWindowLayer")
# Layers that can go back to a mark alone: what they write over is copied for it.
RESTORABLE = (
    *REWINDABLE,
    "DummyLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
_TORN = "_nogemm_torn"  # on a cache whose layers may hold different tokens


def new_cache(model: Any) -> Any:
    """Return an empty cache of keys and values of the model's kind."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def check_cache(cache: Any, ids_BL: Tensor) -> None:
    """Refuse a cache that cannot lie in front of the last token of these prompts.

    Raises:
        ConfigError: it is no cache with layers, was left in the middle of a call, or holds too many tokens or
            other sequences.
    """
    name = type(cache).__name__
    if not callable(getattr(cache, "get_seq_length", None)):
        raise ConfigError(f"generate: cache must be a cache of transformers, got {name}")
    if not isinstance(getattr(cache, "layers", None), list):
        raise ConfigError(f"generate: cache must be one of a decoder alone, such as DynamicCache, got {name}")
    if getattr(cache, _TORN, False):
        raise ConfigError(
            f"generate: a call that was interrupted left this cache in the middle of a token, and a "
            f"{kinds_but(cache, RESTORABLE)} cannot go back; give all tokens so far and a new cache, or none"
        )
    try:
        held = _length(cache)
    except ValueError as error:
        raise ConfigError(f"generate: cache must hold keys and values: {error}") from error
    if held >= ids_BL.shape[1]:
        raise ConfigError(
            f"generate: the cache holds {held} tokens and input_ids {ids_BL.shape[1]}; input_ids must hold all tokens "
            "so far, the cache at most all but the last"
        )
    for layer in cache.layers if held else ():
        keys = getattr(layer, "keys", None)
        if isinstance(keys, Tensor) and keys.numel() and keys.shape[0] != ids_BL.shape[0]:
            raise ConfigError(f"generate: the cache is of {keys.shape[0]} sequences, input_ids of {ids_BL.shape[0]}")


def longest_rewind(cache: Any) -> int:
    """Return how many tokens a `Mark` can go back by; 0: there are layers of another kind than those that can."""
    layers = [layer for layer in cache.layers if type(layer).__name__ != "DummyLayer"]  # those hold nothing
    if not all(type(layer).__name__ in REWINDABLE for layer in layers):
        return 0
    return min((layer.sliding_window - 1 for layer in layers if layer.is_sliding), default=2**31)


@contextmanager
def running(cache: Any) -> Generator[None, None, None]:
    """Note that a model writes to the cache. Left by an error, the cache is torn until a `Mark` has mended it."""
    setattr(cache, _TORN, True)
    yield
    setattr(cache, _TORN, False)


class Mark:
    """A cache as it was.

    A layer replaces its keys and values when it takes a token, so the ones that it had are kept by holding on to them.
    A sliding layer forgets tokens as it goes: what it has to get back is in the mark. States of convolutions and
    recurrences are written over, so the mark has copies of them.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.length = _length(cache)
        self.count = len(cache.layers)
        self.kept = [(layer, _copied(vars(layer))) for layer in cache.layers if type(layer).__name__ in RESTORABLE]

    def rewind(self, tokens: int = 0) -> None:
        """Go back to the mark and the first `tokens` behind it; where there are no more, nothing changes.

        Only a cache with a `longest_rewind` can keep tokens behind the mark. A cache that cannot even go back to the
        mark is torn from then on: `check_cache` refuses it.
        """
        torn = getattr(self.cache, _TORN, False)
        if not torn and _length(self.cache) - self.length <= tokens:
            return
        setattr(self.cache, _TORN, True)  # an interruption in here leaves it so
        if tokens > 0:
            self._cut(tokens)
        else:
            del self.cache.layers[self.count :]  # a cache may make its layers as they are needed
            for layer, state in self.kept:
                vars(layer).update(_copied(state))
        setattr(self.cache, _TORN, len(self.kept) < self.count)

    def _cut(self, tokens: int) -> None:
        for layer, state in self.kept:
            if type(layer).__name__ not in REWINDABLE:
                continue
            length = state["cumulative_length"] if layer.is_sliding else _held(state["keys"])
            new = int(layer.get_seq_length()) - length
            if new > tokens:
                layer.keys = _rewound(state["keys"], layer.keys, new, tokens, layer)
                layer.values = _rewound(state["values"], layer.values, new, tokens, layer)
                if layer.is_sliding:
                    layer.cumulative_length = length + tokens


def _rewound(before: Tensor | None, now: Tensor, new: int, tokens: int, layer: Any) -> Tensor:
    begin = now.shape[-2] - new
    parts = [] if before is None or before.dim() < 4 else [before]
    kept = torch.cat((*parts, now[:, :, begin : begin + tokens]), 2)
    return kept[:, :, -layer.sliding_window + 1 :] if layer.is_sliding else kept


def _held(keys: Tensor | None) -> int:
    return 0 if keys is None or not keys.numel() else keys.shape[-2]


def _length(cache: Any) -> int:
    return int(cache.get_seq_length())


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """Copy what a layer is made of: tensors that it replaces by themselves, those that it writes over as copies.

    The latter, states of convolutions and recurrences, lie in dicts.
    """
    return {name: _copied_states(value) if isinstance(value, dict) else value for name, value in state.items()}


def _copied_states(states: dict[Any, Any]) -> dict[Any, Any]:
    return {index: value.clone() if isinstance(value, Tensor) else value for index, value in states.items()}


def kinds_but(cache: Any, names: Sequence[str]) -> str:
    """Name the kinds of a cache's layers that are not among these; or the cache itself, where there are none."""
    kinds = {type(layer).__name__ for layer in cache.layers} - {*names}
    return " or ".join(sorted(kinds)) or type(cache).__name__
