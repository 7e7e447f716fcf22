"""The states that a model's head sees, and the proof that its logits follow from them in order.

Legend: B sequences, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nogemm.errors import ConfigError
from nogemm.heads import HireHead

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the largest logit


class Decoder:
    """Runs a causal model up to its head, with its cache of keys and values.

    Args:
        model: a causal language model of transformers whose head is `head`.
        cache: to go on from; None: a new one.
    Raises:
        ConfigError: the model's logits are not a rising function of its head's: the largest of the one may not be the
            largest of the other.
    """

    def __init__(self, model: Any, head: HireHead, input_ids_BL: Tensor, cache: Any = None) -> None:
        self.base = base_of(model)
        prove(model, self.base, head, input_ids_BL[:1, :2])
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
        return self.base(**inputs).last_hidden_state[:, -1]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return int(self.cache.get_seq_length())


def new_cache(model: Any) -> Any:
    """Return an empty cache of keys and values of the model's kind."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def base_of(model: Any) -> nn.Module:
    """Return the part of a causal model that ends in the states of its head."""
    base = getattr(model, "base_model", None)
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ConfigError(f"generate: {name} is an encoder and a decoder; only causal models are decoded here")
    if not isinstance(base, nn.Module) or base is model or not _can_generate(model):
        raise ConfigError(f"generate: {name} is no causal language model of transformers")
    return base


def prove(model: Any, base: nn.Module, head: HireHead, ids: Tensor) -> None:
    """Compare the model's logits with those that its head gives for its base's states, scaled and capped as it says."""
    raw = head(base(input_ids=ids, use_cache=False).last_hidden_state).float()
    own = model(input_ids=ids, use_cache=False).logits.float()
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    expected = raw * scale
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        expected = torch.tanh(expected / cap) * cap
    tolerance = TOLERANCE[head.weight.dtype] * float(expected.abs().amax().clamp_min(1e-6))
    if scale <= 0 or expected.shape != own.shape or not bool(((expected - own).abs() <= tolerance).all()):
        raise ConfigError(
            f"generate: the logits of {type(model).__name__} do not follow from its head as its config says; use the "
            "model's own generate, which computes them all"
        )


def _can_generate(model: Any) -> bool:
    known = getattr(model, "can_generate", None)
    return bool(known()) if callable(known) else False
