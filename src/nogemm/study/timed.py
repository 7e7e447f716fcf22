"""Write a layer's config as the words that `nogemm bench layer --method --set` takes."""

from __future__ import annotations

import json
from typing import Any

from nogemm.config import SUM, LayerConfig
from nogemm.study.reading import flattened


def words_of(config: LayerConfig) -> tuple[str, tuple[str, ...]]:
    """Return (method, words) from which `nogemm.config.parse_layer` makes the config again."""
    found = config.to_dict()
    if found["kind"] != SUM:
        return found["kind"], _words(found)
    kinds = [term["kind"] for term in found["terms"]]
    names = [kind + str(kinds[: i + 1].count(kind)) * (kinds.count(kind) > 1) for i, kind in enumerate(kinds)]
    words = [f"{name}.{word}" for name, term in zip(names, found["terms"], strict=True) for word in _words(term)]
    return "+".join(kinds), tuple(words)


def _words(config: dict[str, Any]) -> tuple[str, ...]:
    return tuple(f"{name}={json.dumps(value)}" for name, value in flattened(config) if name != "kind")
