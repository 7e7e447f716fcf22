"""OpenVINO's operator, given packed layers whose header or body was edited: it refuses them, or answers in bounds."""

from __future__ import annotations

import functools
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_target import Choices, Target, expect

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from test_operator import CONFIGS, D_OUT, D, bits, compile_model, graph, packed_layer

from nogemm.export import extension_path

WORDS = (0, 1, -1, 2, 3, 63, 64, 65, 1000, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**31))
LAYERS = [(kind, dtype) for kind in sorted(CONFIGS) for dtype in ("fp32", "bf16", "int8")]


@functools.cache
def good(kind: str, dtype: str) -> bytes:
    """Return the buffer of a packed layer."""
    return packed_layer(kind, dtype).get_buffer("packed").numpy().tobytes()


def edited(choices: Choices, kind: str, dtype: str) -> bytes:
    """Return a packed layer after some edits."""
    packed = bytearray(good(kind, dtype))
    for _ in range(choices.below(5)):
        what = choices.below(5)
        if what == 4:
            packed = packed[: choices.below(len(packed))] or packed
            continue
        at = 8 * choices.below(48) if what < 3 else choices.below(len(packed))
        width = (8, 4, 1, 1)[what]
        value = struct.pack("<q", choices.of(WORDS) if what < 2 else choices.below(256))[:width]
        at = min(at, len(packed) - width)
        packed[at : at + width] = value
    if kind == "lookup" and choices.below(2) and len(packed) > 256:
        packed[8:16] = header_checksum(bytes(packed[:HEADER]))
    return bytes(packed)


HEADER = 208  # bytes of a LookupHeader


def header_checksum(header: bytes) -> bytes:
    """Sign a LookupFFN's header as csrc/packed/lookup/layout.cpp does."""
    total = 0xCBF29CE484222325
    for (word,) in struct.iter_unpack("<Q", header[16:]):
        total = (total ^ word) * 0x9E3779B97F4A7C15 % 2**64
        total ^= total >> 29
    return struct.pack("<Q", total)


def run(data: bytes) -> None:
    """Build and run the graph."""
    choices = Choices(data)
    kind, dtype = choices.of(LAYERS)
    packed = edited(choices, kind, dtype)
    x = torch.randn(1, 1 + choices.below(40), D, generator=torch.Generator().manual_seed(choices.below(9)))
    constant: Any = np.frombuffer(packed, np.uint8)
    try:
        y = compile_model(graph(constant, extension_path()))([x.numpy()])[0]
    except RuntimeError as error:
        expect("nogemm" in str(error), f"an error that is not ours: {error}")
        return
    expect(y.shape == (1, x.shape[1], D_OUT), f"an answer of shape {y.shape}")
    if packed == good(kind, dtype):
        expect(np.array_equal(bits(y), bits(packed_layer(kind, dtype)(x))), "other bits than in torch")


def seeds() -> list[bytes]:
    """Every layer untouched, and edits of each."""
    return [bytes([i, n, 0, 5, 7, 1, 0, 9, 9]) for i in range(len(LAYERS)) for n in (0, 2)]


TARGET = Target("operator", run, seeds, longest=64)
