"""Pack layers and models for evaluation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import overload

from torch import nn

from nogemm.convert.body import restore_body, round_body, rounded_parts
from nogemm.convert.fitted import warn_if_random
from nogemm.convert.packed_cache import PackedCache, check_cache
from nogemm.convert.sites import converted, installed
from nogemm.errors import ConfigError, PackedError
from nogemm.heads import head_of
from nogemm.layers import FFN, PackedFFN
from nogemm.layers._base import check_packing
from nogemm.models.inner import inner_model
from nogemm.ops._packing import buffers_from

BODIES = (None, "int8")


@overload
def pack(target: FFN, dtype: str = "fp32", keep: bool = False, path: str = "auto") -> PackedFFN: ...
@overload
def pack(
    target: nn.Module,
    dtype: str = "fp32",
    keep: bool = False,
    path: str = "auto",
    body: str | None = None,
    cache: str | Path | bool | None = None,
) -> nn.Module: ...
def pack(
    target: nn.Module,
    dtype: str = "fp32",
    keep: bool = False,
    path: str = "auto",
    body: str | None = None,
    cache: str | Path | bool | None = None,
) -> nn.Module:
    """Lay weights out for the native kernels: one call per FFN, for evaluation only.

    A layer gives a new packed layer and stays untouched. A model is changed in place: its converted FFNs become packed
    ones, and the unpacked weights are freed unless `keep`. Afterwards train(), backward and save_pretrained() raise.

    Args:
        dtype: "fp32"; "bf16": rows bfloat16; "int8": rows int8 with a scale per row; both with a projection in 16 bits.
        keep: keep the unpacked weights in memory, so that `unpack` can bring them back.
        path: how layers of neurons (HireFFN, SLIDE, MONGOOSE, Switch, LeafTree) answer: "rows" reads the rows of the
            neurons that a token needs, "dense" multiplies with all of them and masks, "auto" takes what is quicker on
            this machine for the tokens at hand (`nogemm env` shows where it changes; the first use measures it, about
            a second). The neurons are the same; sums are rounded in another order.
        body: of a model, "int8": its other linear layers, attention's above all, are rounded to int8 with a scale per
            row and computed by torch's int8 products. None leaves them. The vocabulary head stays as it is.
        cache: of a model, a folder, or True for nogemm's cache folder: the packed model's tensors lie in a file there,
            which all processes that pack the same model map, so that the machine holds them once. The first one
            writes it. A file that is damaged is made anew, and where none can be written the model stays in this
            process's memory, both with a warning. None: no file.
    Raises:
        PackedError: training mode, or packed already.
        ConfigError: unknown dtype, path or body, nothing of the model is converted, or cache together with keep.
    """
    if body not in BODIES:
        raise ConfigError(f'pack: body must be None or "int8", got body={body!r}')
    if isinstance(target, FFN):
        if body is not None or cache:
            raise ConfigError("pack: body and cache are of a model; a layer alone has none")
        packed = target.pack(dtype, path)
        if keep:
            packed.keep(target)
        return packed
    check_cache(cache or False, keep)
    _check_model(target, dtype, path)
    warn_if_random(target, "pack")
    model = inner_model(target)
    head = head_of(model)
    shared = PackedCache(cache, target, dtype, body, head) if cache else None
    with buffers_from(None if shared is None else shared.buffer):
        _pack_parts(model, dtype, keep, path, body)
    if shared is not None:
        shared.share(target)
    if head is not None:
        head.codes()  # now, not at the first token
    _tell_quantizers(model, packed=bool(installed(model)) or body is not None)
    return target


def _pack_parts(model: nn.Module, dtype: str, keep: bool, path: str, body: str | None) -> None:
    for place in _paths(model):
        layer = model.get_submodule(place)  # one at a time: no list keeps the unpacked weights alive
        assert isinstance(layer, FFN)
        packed = layer.pack(dtype, path)
        packed.site = layer.site
        packed.keep(layer if keep else None)
        model.set_submodule(place, packed)
        del layer
    if body == "int8":
        round_body(model, keep)


def unpack(model: nn.Module) -> nn.Module:
    """Put the unpacked layers of a model packed with keep=True back in place.

    Raises:
        PackedError: the unpacked weights were freed; load the checkpoint again.
    """
    inner = inner_model(model)
    packed = {name: layer for name, layer in installed(inner).items() if isinstance(layer, PackedFFN)}
    rounded = rounded_parts(inner)
    if any(layer.source is None for layer in packed.values()) or any(not layer.source for layer in rounded):
        raise PackedError("unpack: the unpacked weights were freed (keep=False); load the checkpoint again")
    paths = {id(module): path for path, module in inner.named_modules()}
    for layer in packed.values():
        assert layer.source is not None
        inner.set_submodule(paths[id(layer)], layer.source)
    restore_body(inner)
    _tell_quantizers(inner, packed=False)
    return model


def _check_model(model: nn.Module, dtype: str, path: str) -> None:
    """Refuse before the first layer is touched, so that a model is never half packed."""
    layers = installed(model)
    check_packing(dtype, path)
    if not layers and head_of(inner_model(model)) is None:
        raise ConfigError(
            "pack: the model has no converted FFN and no converted head; run nogemm.convert or convert_head first"
        )
    if any(isinstance(layer, PackedFFN) for layer in layers.values()) or rounded_parts(model):
        raise PackedError("pack: the model is packed already")
    if inner_model(model).training or any(layer.training for layer in layers.values()):
        raise PackedError("pack: the model is in training mode; call model.eval() first")


def _paths(model: nn.Module) -> list[str]:
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(layer)] for layer in converted(model).values()]


def _tell_quantizers(model: nn.Module, packed: bool) -> None:
    quantizer = sys.modules.get("nogemm.convert.quantizer")
    if quantizer is not None:
        quantizer.set_packed(model, packed)
