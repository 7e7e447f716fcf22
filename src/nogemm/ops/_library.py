"""The only place that touches torch.library and loads the native extension.

Each op file defines its schema, registers its readable reference for every device, a fake and a backward. The
extension only adds CPU kernels, which then win over the reference. `native_available()` tells the two apart.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import NativeError

LIBRARY = torch.library.Library("nogemm", "DEF")
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define one op: its schema, the reference as the kernel of every device, and its shape function."""
    LIBRARY.define(schema)
    name = schema[: schema.index("(")]
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nogemm::{name}", fake, lib=LIBRARY)


def has_native_kernel(x: Tensor) -> bool:
    """Say whether the op dispatcher may be used for `x`: the CPU kernels take float32 and bfloat16 only.

    Other dtypes on a CPU (float64 for gradcheck, float16) run the reference directly; other devices always dispatch,
    because there the reference is the kernel.
    """
    return x.device.type != "cpu" or x.dtype in NATIVE_DTYPES


def _load() -> ctypes.CDLL | None:
    """Load the extension if it was built; a present but broken one raises."""
    if os.environ.get("NOGEMM_DISABLE_NATIVE") == "1":
        return None
    spec = importlib.util.find_spec("nogemm._native")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(spec.origin)
        native = ctypes.CDLL(spec.origin)
    except OSError as error:
        raise NativeError(f"the native extension {os.path.basename(spec.origin)} does not load: {error}") from error
    native.nogemm_isa.restype = ctypes.c_char_p
    native.nogemm_isa_supported.restype = ctypes.c_char_p
    native.nogemm_isa_supported.argtypes = [ctypes.c_int]
    native.nogemm_set_isa.restype = ctypes.c_char_p
    native.nogemm_set_isa.argtypes = [ctypes.c_char_p]
    return native


_NATIVE = _load()


def native_available() -> bool:
    """Say whether the compiled kernels are loaded (False: every op runs its PyTorch reference)."""
    return _NATIVE is not None


def native() -> ctypes.CDLL:
    """Return the loaded extension, or raise NativeError."""
    if _NATIVE is None:
        raise NativeError("the native extension is not loaded; was it built, and is NOGEMM_DISABLE_NATIVE unset?")
    return _NATIVE


@cache
def native_digest() -> str | None:
    """Return a digest of the extension's file, which tells one build from another; None without the extension."""
    if _NATIVE is None:
        return None
    with open(_NATIVE._name, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def isa() -> str:
    """Name the instruction set in force: scalar, avx2, avx512, avx512_vnni, avx512_bf16, neon, or `reference`."""
    return native().nogemm_isa().decode() if native_available() else "reference"


@cache
def supported_isas() -> tuple[str, ...]:
    """List the instruction sets that were built and that this machine can run, slowest first."""
    names: list[str] = []
    while native_available() and (name := native().nogemm_isa_supported(len(names))):
        names.append(name.decode())
    return tuple(names)


def set_isa(name: str) -> None:
    """Use the kernels of another instruction set from now on (packed layers must be packed again).

    Raises:
        NativeError: no extension, an unknown name, or one that this machine cannot run.
    """
    message = native().nogemm_set_isa(name.encode())
    if message:
        raise NativeError(message.decode())


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Use the kernels of another instruction set inside the block; what is packed must be packed inside.

    Raises:
        NativeError: see `set_isa`; nothing is asked of the extension for the one in force.
    """
    before = isa()
    if name != before:
        set_isa(name)
    try:
        yield
    finally:
        if isa() != before:
            set_isa(before)


def _check_forced_isa() -> None:
    """Refuse an NOGEMM_ISA or NOGEMM_MAX_ISA that did not take effect, instead of running something else silently."""
    wanted = os.environ.get("NOGEMM_ISA")
    held = os.environ.get("NOGEMM_MAX_ISA")
    if held and native_available() and not isa() and not wanted:
        raise NativeError(
            f"NOGEMM_MAX_ISA={held} is unknown; this machine and build know: {', '.join(supported_isas())}"
        )
    if wanted and native_available() and isa() != wanted:
        raise NativeError(
            f"NOGEMM_ISA={wanted} cannot be used here; this machine and build support: {', '.join(supported_isas())}"
        )


_check_forced_isa()
