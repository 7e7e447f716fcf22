"""Which module of a model is transformers' own."""

from __future__ import annotations

from torch import nn


def inner_model(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a SentenceTransformer, or the model itself."""
    first = getattr(model, "_first_module", None)
    if callable(first):
        inner = getattr(first(), "auto_model", None)
        if isinstance(inner, nn.Module):
            return inner
    return model
