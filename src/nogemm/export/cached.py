"""A decoder as a host takes it: new tokens and the keys and values of earlier ones in, the last state and all keys and
values out.

Masks are made here, from positions in the cache, in operations that a trace can hold; transformers makes them with
loops over shapes. Rows of the embedding are looked up by an operator of ours, because head and embedding share them.

Legend: B sequences, L new tokens, T tokens so far, the new ones included, H heads of keys, K width of a head, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nogemm.decoding.caches import new_cache
from nogemm.decoding.states import base_of
from nogemm.errors import ConfigError
from nogemm.ops.packed_head import ROW_DTYPES

INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
_KINDS = ("full_attention", "sliding_attention")


class Past:
    """Keys and values of a model's layers, in the way that its attention asks a cache for them."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self.states = [[states[i], states[i + 1]] for i in range(0, len(states), 2)]
        self.order: list[int] = []  # layers that have a cache, as they ask

    def update(self, key_BHLK: Tensor, value_BHLK: Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """Put new keys and values behind the earlier ones of a layer; return them all."""
        own = self.states[len(self.order)]
        self.order.append(layer_idx)
        own[:] = [torch.cat((own[0], key_BHLK), dim=-2), torch.cat((own[1], value_BHLK), dim=-2)]
        return own[0], own[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return T - L."""
        return self.states[0][0].shape[-2]

    def flat(self) -> tuple[Tensor, ...]:
        """Return key and value of each layer, one after the other."""
        return tuple(state for pair in self.states for state in pair)


class _Rows(TorchFunctionMode):
    """Looks up the embedding's rows by our operator while it is active, whatever the model does with them then."""

    def __init__(self, weight: Tensor, rows: Tensor, dtype: int) -> None:
        super().__init__()
        self.weight, self.rows, self.dtype = weight, rows, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.embedding and args[1] is self.weight:
            return torch.ops.nogemm.embed_rows(args[0], self.rows, self.dtype)
        return func(*args, **(kwargs or {}))


class CachedDecoder(nn.Module):
    """The part of a causal model in front of its head, with its cache as inputs and outputs.

    Args:
        model: of transformers, float32, in evaluation mode; its head is not run.
        rows_VD: of the embedding, as the host will store them.
    Raises:
        ConfigError: the model's masks or its cache are of another kind.
    """

    def __init__(self, model: Any, rows_VD: Tensor) -> None:
        super().__init__()
        self.base = base_of(model)
        self.config: Any = model.config.get_text_config()
        self.kinds, self.window = _masks(self.config)
        self.embedding: Tensor = model.get_input_embeddings().weight
        self.dtype = ROW_DTYPES[rows_VD.dtype]
        self.register_buffer("rows", rows_VD.contiguous().view(torch.uint8), persistent=False)
        self.shapes = _cache_shapes(model, self.base)
        self.vocabulary = rows_VD.shape[0]

    def forward(
        self, ids_BL: Tensor, mask_BT: Tensor, positions_BL: Tensor, beam_B: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = Past([state.index_select(0, beam_B) for state in past])
        masks = {kind: self._mask(ids_BL, mask_BT, kind) for kind in self.kinds}
        typed = getattr(self.config, "layer_types", None) is not None
        with _Rows(self.embedding, self.get_buffer("rows"), self.dtype):
            found = self.base(
                input_ids=ids_BL,
                attention_mask=masks if typed else masks[self.kinds[0]],
                position_ids=positions_BL,
                past_key_values=cache,
                use_cache=True,
            )
        return (found.last_hidden_state[:, -1:], *cache.flat())

    def _mask(self, ids_BL: Tensor, mask_BT: Tensor, kind: str) -> Tensor:
        """Return what is added to scores, [B, 1, L, T]: 0 where a token may look, a very small number elsewhere."""
        total, new = mask_BT.shape[1], ids_BL.shape[1]
        own_T = torch.arange(total).unsqueeze(0)
        place_L1 = torch.arange(new).unsqueeze(1) + (total - new)
        sees = own_T <= place_L1
        if kind == "sliding_attention":
            sees = sees & (own_T > place_L1 - self.window)
        sees = sees[None, None] & mask_BT[:, None, None, :].bool()
        return torch.where(sees, 0.0, torch.finfo(torch.float32).min)

    def example(self) -> tuple[Tensor, ...]:
        """Return inputs to trace with: shapes of which no two agree by chance."""
        batch, earlier, new = 2, 5, 3
        ids = torch.arange(batch * new).view(batch, new) % self.vocabulary
        mask = torch.ones(batch, earlier + new, dtype=torch.int64)
        positions = torch.arange(earlier, earlier + new).expand(batch, new).contiguous()
        past = [torch.zeros(batch, heads, earlier, width) for heads, width in self.shapes]
        return ids, mask, positions, torch.arange(batch, dtype=torch.int32), *past


def _masks(config: Any) -> tuple[tuple[str, ...], int]:
    """Return the kinds of masks that a model's layers take, and the window of sliding ones."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    name = type(config).__name__
    if types is None:
        uniform = bool(window) and getattr(config, "use_sliding_window", True)
        kinds = _KINDS[1:] if uniform else _KINDS[:1]
    else:
        kinds = tuple(kind for kind in _KINDS if kind in types)
        if others := sorted(set(types) - set(_KINDS)):
            raise ConfigError(f"export: layers of kind {', '.join(others)} ({name}) have no export for generation")
    if getattr(config, "use_bidirectional_attention", None):
        raise ConfigError(f"export: {name} lets tokens look ahead; it cannot be decoded token by token")
    if _KINDS[1] in kinds and not window:
        raise ConfigError(f"export: {name} has sliding layers and no sliding_window")
    return kinds, int(window or 0)


def _cache_shapes(model: Any, base: nn.Module) -> list[tuple[int, int]]:
    """Run one token; return (heads, width) of the keys and values of each layer, key and value in turn."""
    cache = new_cache(model)
    try:
        with torch.inference_mode():
            base(input_ids=torch.zeros(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        states = [state for layer in cache.layers for state in (layer.keys, layer.values)]
        shapes = [(state.shape[1], state.shape[3]) for state in states if state.dim() == 4 and state.shape[2] == 1]
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise ConfigError(f"export: {type(model).__name__} has no cache of keys and values: {error}") from error
    if not shapes or len(shapes) != len(states):
        raise ConfigError(f"export: {type(model).__name__} has no plain cache of keys and values")
    return shapes
