"""One copy of a packed model's tensors for all processes of a machine that run it.

The first process packs, writes every tensor of the packed model into a file of the cache, and lets go of its own copy;
it and every other process map the file. Its name is a digest of all that the packed tensors follow from.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.packed_file import FORMAT, PackedFile, as_bytes, write_packed
from nogemm.convert.sites import converted
from nogemm.errors import CheckpointError, ConfigError, PackedError
from nogemm.files import cache_folder
from nogemm.heads import HireHead
from nogemm.ops._library import native_digest
from nogemm.ops.head_scan import HeadCodes
from nogemm.version import __version__

_HEAD = "codes of the head: "


class PackedCache:
    """The packed tensors of one model, from a file or on their way into one.

    Args:
        folder: True: `packed` in the folder that $NOGEMM_CACHE names, else in nogemm's folder of the user's cache.
        model: converted, and not packed yet.
        dtype, body: as in `nogemm.pack`.
        head: its converted head, or None.
    Attributes:
        path: the file.
    Cost: one pass over all weights, for the digest, and one over the file, if it is there.
    """

    def __init__(
        self, folder: str | Path | bool, model: nn.Module, dtype: str, body: str | None, head: HireHead | None
    ) -> None:
        place = cache_folder() / "packed" if folder is True else Path(str(folder))
        self.path = place / f"packed-{digest(model, dtype, body, head)}.safetensors"
        self._head = head
        self._asked = 0
        self._made: dict[int, tuple[str, Tensor]] = {}
        self._file: PackedFile | None = None
        try:
            self._file = PackedFile(self.path)
        except (FileNotFoundError, NotADirectoryError):
            pass  # the first to pack this model, or a folder that the writing will complain of
        except (OSError, CheckpointError) as error:
            warnings.warn(f"pack: the file {self.path} is not used: {error}. It is made anew", stacklevel=3)

    def buffer(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the next packed buffer: the file's, or one that is made now."""
        name = f"buffer {self._asked}"
        self._asked += 1
        if self._file is not None:
            return self._stored(self._file, name)
        made = make()
        self._made[id(made)] = name, made
        return made

    def share(self, model: nn.Module) -> None:
        """Put tensors on the mapped file in the place of the packed model's own; write the file if there was none.

        Where it cannot be written, the model keeps its own tensors, with a warning.
        """
        if self._file is None:
            codes = {} if self._head is None else _tensors_of(self._head.codes())
            try:
                write_packed(self.path, {**dict(self._made.values()), **dict(self._named(model)), **codes})
                self._file = PackedFile(self.path)
            except (OSError, CheckpointError) as error:
                warnings.warn(
                    f"pack: the packed model cannot be shared, and stays in this process's own memory: {error}",
                    stacklevel=3,
                )
                return
        self._replace(model, self._file)
        if self._head is not None:
            codes = {field.name: self._stored(self._file, _HEAD + field.name) for field in fields(HeadCodes)}
            self._head.take_codes(HeadCodes(**codes))  # last: they belong to the weights where these lie now

    def _named(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """List each tensor of the model that can be shared once, by the name that it has in the file."""
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if id(tensor) in self._made:
                yield self._made[id(tensor)]
            elif _is_shared(tensor):
                yield f"tensor {name}", tensor

    def _replace(self, model: nn.Module, file: PackedFile) -> None:
        stored = set(file.names)
        mapped: dict[int, Tensor] = {}
        for name, tensor in self._named(model):
            if name not in stored:
                continue
            mapped[id(tensor)] = found = self._stored(file, name)
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise self._misfit(f"{name} is {found.dtype} {tuple(found.shape)}")
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and id(buffer) in mapped:
                    module._buffers[name] = mapped[id(buffer)]
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) in mapped:
                    parameter.data = mapped[id(parameter)]

    def _stored(self, file: PackedFile, name: str) -> Tensor:
        try:
            return file.tensor(name)
        except KeyError as error:
            raise self._misfit(f"{name!r} is missing") from error

    def _misfit(self, why: str) -> PackedError:
        return PackedError(f"pack: the file {self.path} is not of this model: {why}. Delete it")


def check_cache(cache: object, keep: bool) -> None:
    """Refuse what `nogemm.pack` cannot do with a cache.

    Raises:
        ConfigError: of another type, or with `keep`.
    """
    if not isinstance(cache, (str, Path, bool)):
        raise ConfigError(f"pack: cache must be True, a folder or None, got cache={cache!r}")
    if cache is not False and not hasattr(mmap, "MAP_PRIVATE"):
        raise ConfigError("pack: cache= needs a system whose files can be mapped copy-on-write, such as Linux")
    if keep and cache is not False:
        raise ConfigError(
            "pack: keep=True keeps the unpacked weights in this process's memory, which cache= is there to avoid: "
            "choose one"
        )


def digest(model: nn.Module, dtype: str, body: str | None, head: HireHead | None) -> str:
    """Return 32 hexadecimal digits of what packed tensors follow from.

    These are all weights, the configs of converted layers, the precision, the releases of nogemm and torch, and the
    compiled kernels, whose build says the layout. The instruction set in force is none of them: layouts are the same
    for all.
    """
    sites = {name: [repr(layer.config), repr(layer.shape)] for name, layer in converted(model).items()}
    told = [
        FORMAT,
        __version__,
        torch.__version__,
        native_digest(),
        dtype,
        body,
        sites,
        None if head is None else head.config,
    ]
    found = hashlib.sha256(json.dumps(told, default=repr).encode())
    seen: dict[int, str] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {seen.get(id(tensor), '')}\n".encode())
        if id(tensor) not in seen:
            seen[id(tensor)] = name
            found.update(as_bytes(tensor))
    return found.hexdigest()[:32]


def _is_shared(tensor: Tensor) -> bool:
    """Tell whether a tensor is of a kind that a file can stand in for.

    Small ones, too: a single view would keep the whole checkpoint mapped.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes > 0


def _tensors_of(codes: HeadCodes) -> dict[str, Any]:
    return {_HEAD + field.name: getattr(codes, field.name).contiguous() for field in fields(HeadCodes)}
