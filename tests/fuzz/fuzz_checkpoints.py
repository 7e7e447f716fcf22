"""Converted checkpoints: edits of config.json, of the safetensors header and of the numbers, signed anew or not."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fuzz_target import HOSTILE, Choices, Target, answer_or_error, bounded, edit_json, expect, folder
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))
from safetensors.torch import load
from tiny_models import FAMILIES, SMALL, train_a_little

import nogemm
from nogemm.convert.checkpoint import checksum
from nogemm.convert.sites import converted
from nogemm.models.loading import load_model

DTYPES = ("F32", "F16", "BF16", "I8", "U8", "I64", "F64", "BOOL", "F8_E4M3", "X")


@functools.cache
def good() -> tuple[dict[str, Any], bytes]:
    """Return config.json and model.safetensors of a tiny converted BERT."""
    model: Any = FAMILIES["bert"].build()
    nogemm.convert(model, SMALL)
    train_a_little(model)
    with folder() as place:
        nogemm.save(model, place / "m")
        return json.loads((place / "m" / "config.json").read_text()), (place / "m" / "model.safetensors").read_bytes()


def split(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file and what follows it."""
    size = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def joined(header: str, body: bytes) -> bytes:
    """Return a safetensors file."""
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


class Edited:
    """A checkpoint under edit: the config, the weights' header as (name, entry) pairs, the numbers, and raw edits."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.config, weights = good()
        header, self.body = split(weights)
        self.entries: list[tuple[str, Any]] = list(header.items())
        self.raw: list[tuple[str, int, int]] = []
        self.signed = False

    def edit(self) -> None:
        """Make one edit."""
        (self._config, self._site, self._header, self._numbers, self._bytes, self._sign)[self.choices.below(6)]()

    def _config(self) -> None:
        self.config = edit_json(self.config, self.choices)

    def _site(self) -> None:
        """Aim at what is ours in config.json."""
        stored = self.config.get("quantization_config") if isinstance(self.config, dict) else None
        if isinstance(stored, dict):
            self.config = {**self.config, "quantization_config": edit_json(stored, self.choices)}

    def _header(self) -> None:
        at = self.choices.below(len(self.entries))
        (name, entry), what = self.entries[at], self.choices.below(7)
        other, its = self.entries[self.choices.below(len(self.entries))]
        if what == 0:
            del self.entries[at]
            self.entries = self.entries or [("x", {})]
        elif what == 1:
            self.entries[at] = (other, entry)  # a name that stands twice
        elif what == 2:
            self.entries[at] = (name, its)  # the numbers of another tensor
        elif what == 3 and isinstance(entry, dict):
            self.entries[at] = (name, {**entry, "dtype": self.choices.of(DTYPES)})
        elif what == 4 and isinstance(entry, dict):
            shape = [self.choices.of((0, 1, 2, 4, 8, 16, 2**31, 2**62, -1)) for _ in range(self.choices.below(4))]
            self.entries[at] = (name, {**entry, "shape": shape})
        elif what == 5 and isinstance(entry, dict):
            ends = [self.choices.of((0, 4, 64, len(self.body), 2**40, 2**64)) for _ in range(2)]
            self.entries[at] = (name, {**entry, "data_offsets": ends})
        else:
            self.entries[at] = (name, self.choices.of(HOSTILE))

    def _numbers(self) -> None:
        """Put NaN, infinity or a flipped bit among the numbers."""
        at = self.choices.below(len(self.body))
        value = self.choices.of((b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", bytes([self.body[at] ^ 1])))
        self.body = self.body[:at] + value + self.body[at + len(value) :]

    def _bytes(self) -> None:
        self.raw.append((self.choices.of(("model.safetensors", "config.json")), self.choices.below(1 << 16),
                         self.choices.below(257)))  # fmt: skip

    def _sign(self) -> None:
        self.signed = True

    def write(self, place: Path) -> None:
        """Write both files."""
        weights = joined("{" + ",".join(f"{json.dumps(n)}:{json.dumps(e)}" for n, e in self.entries) + "}", self.body)
        if self.signed:
            _sign_anew(self.config, weights)
        files = {"model.safetensors": weights, "config.json": json.dumps(self.config).encode("utf-8", "surrogatepass")}
        for name, at, value in self.raw:
            data = files[name]
            at = at % (len(data) + 1)
            files[name] = data[:at] if value == 256 else data[:at] + bytes([value]) + data[at + 1 :]
        for name, data in files.items():
            (place / name).write_bytes(data)


def _sign_anew(config: Any, weights: bytes) -> None:
    """Write the checksums of the numbers as they are now, as somebody would who wants them to be believed."""
    try:
        tensors, checksums = load(weights), config["quantization_config"]["checksums"]
        for site, own in checksums.items():
            for key in own:
                own[key] = checksum(tensors[f"bert.{site}.intermediate.{key}"])
    except Exception:
        return  # what was edited cannot be signed


def ours(model: Any) -> Mapping[str, Tensor]:
    """Return the tensors of the converted layers."""
    return {
        f"{name}.{key}": value for name, layer in converted(model).items() for key, value in layer.state_dict().items()
    }


@functools.cache
def original() -> Mapping[str, Tensor]:
    """Return the tensors of the good checkpoint's layers."""
    config, weights = good()
    with folder() as place:
        (place / "config.json").write_text(json.dumps(config))
        (place / "model.safetensors").write_bytes(weights)
        return ours(load_model(place))


def run(data: bytes) -> None:
    """Load the edited checkpoint: it is refused, or our tensors are those that were saved, unless signed anew."""
    choices = Choices(data)
    edited = Edited(choices)
    for _ in range(choices.below(5)):
        edited.edit()
    expected = original()
    with folder() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edited.write(place)
        size = sum(file.stat().st_size for file in place.iterdir())
        with bounded(size):
            model = answer_or_error(lambda: load_model(place), OSError, ValueError, ImportError)
        if model is None:
            return
        found = ours(model)
        stored = getattr(getattr(model.config, "quantization_config", None), "stored", {})
        if not edited.signed and stored.get("save_id"):
            for name, value in found.items():
                same = name in expected and torch.equal(_bits(value), _bits(expected[name]))
                expect(same, f"{name} is not what was saved, and nothing said so")
        if found:
            answer_or_error(lambda: model(input_ids=torch.tensor([[3, 4, 5]])), Exception)


def _bits(value: Tensor) -> Tensor:
    return value.detach().contiguous().flatten().view(torch.uint8)


def seeds() -> list[bytes]:
    """One edit of every sort, and none."""
    return [b"\0", *(bytes([1, sort, *range(k, k + 24)]) for sort in range(6) for k in (1, 40))]


TARGET = Target("checkpoints", run, seeds, longest=96)
