"""Layer and head configs: JSON as in config.json, and the words of a command line."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from fuzz_target import Target, answer_or_error, expect

from nogemm.config import Config, head_config, layer_config, parse_layer
from nogemm.heads import HeadConfig
from nogemm.testing.cases import KINDS, LOOKUP_CASES


def _check(config: Config | None, read: Any) -> None:
    """What was accepted is written as JSON and comes back the same."""
    if config is None:
        return
    text = json.dumps(config.to_dict(), allow_nan=False)
    expect(read(json.loads(text)) == config, f"{config} came back as another one")


def run(data: bytes) -> None:
    """First byte: how the rest is read."""
    form, text = data[:1], data[1:].decode("utf-8", "surrogateescape")
    if form == b"c":
        method, *words = text.split("\n")
        _check(answer_or_error(lambda: parse_layer(method, words)), layer_config)
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return  # the files that hold configs are other targets' business
    read = head_config if form == b"h" else layer_config
    _check(answer_or_error(lambda: read(value)), read)


def seeds() -> list[bytes]:
    """Every kind of layer in JSON, and some command lines."""
    configs = [*KINDS.values(), *(case.config for case in LOOKUP_CASES)]
    lines = [
        "lookup\ntables=64\nprojection.block=32",
        "dense+lookup\ndense.hidden=3\nlookup.bits=4",
        "no",
        "tree\ndepth=3",
    ]
    head = json.dumps(HeadConfig().to_dict())
    return [
        *(b"l" + json.dumps(config.to_dict()).encode() for config in configs),
        *(b"c" + line.encode() for line in lines),
        b"h" + head.encode(),
    ]


def _words() -> list[str]:
    names = {field.name for config in KINDS.values() for field in dataclasses.fields(config)}
    return [*KINDS, *sorted(names), "projection", "kind", "terms", "null", "true", "1e999", "NaN", "-1", "[[", "}}"]


TARGET = Target("configs", run, seeds, _words())
