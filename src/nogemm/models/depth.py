"""Leave layers of a model out: a student with fewer layers than its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nogemm.errors import ConfigError
from nogemm.models.inner import inner_model


def keep_layers(model: nn.Module, kept: Sequence[int]) -> tuple[int, ...]:
    """Keep some of a model's layers, attention and FFN, and leave the others out, in place.

    The config is changed with it, so that the model saves and loads as one of its new depth. Distil it next: `distil`
    needs `hidden_map`, which says which of the teacher's hidden states each layer should reproduce. That after the kept
    layer i is number i + 1.

    Args:
        model: a transformers model, or a SentenceTransformer with one inside, that has one list of layers.
        kept: numbers of the layers that stay, from 0, in rising order; negative ones count from the end.
    Returns:
        the numbers kept, as `hidden_map` counts them, i + 1.
    Raises:
        ConfigError: a number is out of range or not in order, or the model has not one list of layers; it is unchanged
            then.
    """
    root: Any = inner_model(model)
    parent, name, stack = _stack_of(root)
    count = len(stack)
    wanted = [number + count if number < 0 else number for number in kept]
    if not wanted or wanted != sorted(set(wanted)) or wanted[0] < 0 or wanted[-1] >= count:
        raise ConfigError(f"keep_layers: numbers from 0 to {count - 1} in rising order, got {list(kept)}")
    setattr(parent, name, nn.ModuleList(stack[i] for i in wanted))
    for place, old in enumerate(wanted):
        for part in stack[old].modules():  # a cache of keys and values is numbered by layers
            if getattr(part, "layer_idx", None) == old:
                part.layer_idx = place  # type: ignore[assignment]
    config = root.config.get_text_config()
    config.num_hidden_layers = len(wanted)
    types = getattr(config, "layer_types", None)
    if isinstance(types, list) and len(types) == count:
        config.layer_types = [types[i] for i in wanted]
    return tuple(i + 1 for i in wanted)


def spread_numbers(layers: int, count: int) -> tuple[int, ...]:
    """Return `count` of the numbers from 0 to layers - 1, evenly spread, the first and the last among them."""
    return tuple(round(i * (layers - 1) / max(1, count - 1)) for i in range(count))


def layer_paths(model: nn.Module) -> list[str]:
    """Return the paths of a model's layers, in order, such as "encoder.layer.0"; raises as `keep_layers`."""
    root = inner_model(model)
    _, _, stack = _stack_of(root)
    paths = {id(module): path for path, module in root.named_modules()}
    return [paths[id(layer)] for layer in stack]


def _stack_of(root: Any) -> tuple[nn.Module, str, nn.ModuleList]:
    config: Any = getattr(root, "config", None)
    layers = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "num_hidden_layers", 0)
    found = [
        (parent, name, stack)
        for parent in root.modules()
        for name, stack in parent.named_children()
        if isinstance(stack, nn.ModuleList) and len(stack) == layers
    ]
    if len(found) != 1:
        raise ConfigError(
            f"keep_layers: {type(root).__name__} has {len(found)} lists of {layers} layers, one is needed"
        )
    return found[0]
