"""Store the tables of a converted model in fewer bytes, and back."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from nogemm.convert.checkpoint import attach
from nogemm.convert.fitted import is_random
from nogemm.convert.sites import converted, installed
from nogemm.errors import ConfigError, PackedError
from nogemm.layers import FFN, PackedFFN
from nogemm.models.inner import inner_model

Model = TypeVar("Model", bound=nn.Module)


def compress(model: Model, tables: str = "int8") -> Model:
    """Store the tables of every converted LookupFFN as int8 with a scale per row, or as bf16, in place.

    The model then saves, loads and packs without an fp32 copy of its tables. For evaluation: decompress before
    fine-tuning.

    Raises:
        ConfigError: no site has tables, or `tables` is unknown.
        PackedError: the model is packed.
    """
    for layer in _with_tables(model, "compress"):
        if layer.storage != tables:
            random = is_random(layer)
            layer.decompress().compress(tables)
            if not random and layer.fitted == "random":
                layer.fitted = "trained"  # the parameters that showed it are gone
    attach(inner_model(model))
    return model


def decompress(model: Model) -> Model:
    """Turn compressed tables back into trainable parameters, in place (what was rounded stays rounded)."""
    for layer in _with_tables(model, "decompress"):
        layer.decompress()
    attach(inner_model(model))
    return model


def _with_tables(model: nn.Module, action: str) -> list[FFN]:
    if isinstance(model, FFN):
        return [model]
    if any(isinstance(layer, PackedFFN) for layer in installed(model).values()):
        raise PackedError(f"{action}: the model is packed; {action} it before packing")
    layers = [layer for layer in converted(model).values() if layer.storage is not None]
    if not layers:
        raise ConfigError(f"{action}: the model has no converted FFN with tables; run nogemm.convert first")
    return layers
