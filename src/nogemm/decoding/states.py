"""The states that a model's head sees, and the proof that its logits follow from them, cache and all.

Legend: B sequences, L tokens, D width.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.decoding.caches import REWINDABLE, Mark, check_cache, kinds_but, longest_rewind, new_cache, running
from nogemm.errors import ConfigError, NogemmError, NotFiniteError
from nogemm.heads import HireHead

# Of the largest number compared: two ways through the same products in this precision.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
_PROVEN: weakref.WeakKeyDictionary[HireHead, tuple[weakref.ref[nn.Module], Scaling]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Scaling:
    """What a model does to its head's logits: logit = cap tanh(scale z / cap), or scale z without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        """Return the model's logits for the head's."""
        scaled = z * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


class Decoder:
    """Runs a causal model up to its head, with its cache of keys and values.

    Args:
        model: a causal language model of transformers whose head is `head`.
        cache: to go on from; None: a new one.
    Raises:
        ConfigError: the model's logits are not a rising function of its head's, it does not remember by a cache of keys
            and values, or `cache` does not fit the prompt.
        NotFiniteError: the states of the prompt's first tokens are not finite.
    """

    def __init__(self, model: Any, head: HireHead, input_ids_BL: Tensor, cache: Any = None) -> None:
        self.base = base_of(model)
        self.scaling = prove(model, self.base, head, input_ids_BL)
        if cache is not None:
            check_cache(cache, input_ids_BL)
        self.cache = new_cache(model) if cache is None else cache

    def states(self, ids_BL: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Run new tokens behind those of the cache; return the last state of each sequence, [B, D].

        Args:
            mask_BT: of all tokens so far, 0 for padding; None: there is none.
        """
        inputs: dict[str, Any] = {"input_ids": ids_BL, "past_key_values": self.cache, "use_cache": True}
        if mask_BT is not None:
            positions = (mask_BT.cumsum(1) - 1).clamp_min(0)
            inputs |= {"attention_mask": mask_BT, "position_ids": positions[:, -ids_BL.shape[1] :]}
        with running(self.cache):
            return self.base(**inputs).last_hidden_state[:, -1]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())

    def mark(self) -> Mark:
        """Remember the cache as it is, to go back to."""
        return Mark(self.cache)

    @property
    def longest_rewind(self) -> int:
        """Tokens that a `Mark` can go back by; 0: the cache has layers of another kind than those that can."""
        return longest_rewind(self.cache)

    @property
    def fixed_layers(self) -> str:
        """The kinds of the cache's layers that tokens cannot be taken back from."""
        return kinds_but(self.cache, REWINDABLE)


def base_of(model: Any) -> nn.Module:
    """Return the part of a causal model that ends in the states of its head."""
    base = getattr(model, "base_model", None)
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"generate: {name} is an encoder and a decoder; only causal models are decoded here")
    if not isinstance(base, nn.Module) or base is model or not _can_generate(model):
        raise ConfigError(f"generate: {name} is no causal language model of transformers")
    return base


def prove(model: Any, base: nn.Module, head: HireHead, ids_BL: Tensor) -> Scaling:
    """Show on three tokens that decoding by states and head is the model's own; once for each model and head."""
    known = _PROVEN.get(head)
    if known is not None and known[0]() is model:
        return known[1]
    ids = ids_BL[:1, -3:]
    ids = ids.repeat(1, 3)[:, :3]
    name = type(model).__name__
    doing = "does not run on three tokens of the prompt"
    try:
        states = base(input_ids=ids, use_cache=False).last_hidden_state
        own = model(input_ids=ids, use_cache=False).logits.float()
        doing = "cannot be decoded with a cache of keys and values"
        cache = new_cache(model)
        for place in range(3):
            last = base(input_ids=ids[:, place : place + 1], past_key_values=cache, use_cache=True).last_hidden_state
    except NogemmError:  # such as that another rank has ended
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise ConfigError(f"generate: {name} {doing}: {error}") from error
    if not bool(states.isfinite().all()):
        raise NotFiniteError(f"the states of {name} for the tokens {ids[0].tolist()} of the prompt are not finite")
    scaling = _scaling(model)
    raw = head(states).float()
    if scaling.scale <= 0 or not _close(scaling(raw), own, head):
        raise ConfigError(
            f"generate: the logits of {name} do not follow from its head as its config says; use the model's own "
            "generate, which computes them all"
        )
    if not _close(last[:, -1].float(), states[:, -1].float(), head):
        raise ConfigError(
            f"generate: {name} does not remember tokens by a cache of keys and values; use the model's own generate"
        )
    _PROVEN[head] = weakref.ref(model), scaling
    return scaling


def _scaling(model: Any) -> Scaling:
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Scaling(scale, getattr(config, "final_logit_softcapping", None) or None)


def _close(one: Tensor, other: Tensor, head: HireHead) -> bool:
    """Compare within rounding; what overflows has to overflow alike."""
    if one.shape != other.shape:
        return False
    size = float(other[other.isfinite()].abs().amax()) if bool(other.isfinite().any()) else 0.0
    return bool(((one == other) | ((one - other).abs() <= TOLERANCE[head.weight.dtype] * size)).all())


def _can_generate(model: Any) -> bool:
    known = getattr(model, "can_generate", None)
    return bool(known()) if callable(known) else False
