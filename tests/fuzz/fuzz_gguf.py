"""GGUF files: a good one of a single layer, with bytes and whole numbers replaced, cut and made longer."""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path

import torch
from fuzz_target import Choices, Target, answer_or_error, bounded, expect, folder

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_gguf import write_gguf

from nogemm.models.loading import load_model

NUMBERS = (0, 1, 2, 3, 8, 12, 64, 255, 2**16, 2**20, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
HEADER = 2048  # the fields and the tensors' shapes lie in the first bytes; what follows are numbers


@functools.cache
def good() -> bytes:
    """Return the bytes of a good file."""
    with folder() as place:
        write_gguf(place / "good.gguf")
        return (place / "good.gguf").read_bytes()


def edited(data: bytes) -> bytes:
    """Return the good file after the edits that `data` stands for."""
    choices, file = Choices(data), good()
    for _ in range(choices.below(6)):
        what = choices.below(6)
        at = choices.below(HEADER if what else len(file)) % len(file)
        if what <= 1:
            value = bytes([choices.below(256)])
        elif what <= 3:
            value = choices.of(NUMBERS).to_bytes(8, "little")[: 4 if what == 2 else 8]
        elif what == 4:
            file = file[: choices.below(len(file))] or b"G"
            continue
        else:
            file = file[:at] + file[at + choices.below(16) :] + bytes(choices.below(16))
            continue
        file = file[:at] + value + file[at + len(value) :]
    return file


def run(data: bytes) -> None:
    """Load it: a model whose answer has a shape, or an error."""
    file = edited(data)
    with folder() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (place / "x.gguf").write_bytes(file)
        # Its numbers are widened to float32: four bytes for each of a packed file.
        with bounded(8 * len(file)):
            model = answer_or_error(lambda: load_model(place / "x.gguf"))
        if model is not None:
            expect(all(p.dtype == torch.float32 for p in model.parameters()), "other numbers than float32")


def seeds() -> list[bytes]:
    """No edit, and one of every sort."""
    return [b"\0", *(bytes([1, what, 40, 0, what, what, 1, 2, 3]) for what in range(6))]


TARGET = Target("gguf", run, seeds, longest=64)
