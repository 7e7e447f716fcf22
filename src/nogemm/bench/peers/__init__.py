"""The dense engines that ours is timed beside: one name each, all called alike.

An engine compiles an fp32 module into a runner; a runner turns torch inputs into its own kind outside the clock, runs
inside it, and gives torch outputs back for the comparison. An engine whose packages are absent stays in every table,
as a row that says what to install.
"""

from __future__ import annotations

import importlib
import importlib.util
import sysconfig
from pathlib import Path

from nogemm.bench.peers._base import Engine, Runner

__all__ = ["CONTENDERS", "LAYERS_ONLY", "Engine", "Runner", "engine", "missing"]

_MODULES = {
    "torch": "nogemm.bench.peers.eager",
    "inductor": "nogemm.bench.peers.inductor",
    "onnxruntime": "nogemm.bench.peers.onnx_runtime",
    "openvino": "nogemm.bench.peers.openvino_engine",
    "jax": "nogemm.bench.peers.jax_engine",
}
_REQUIRES = {
    "torch": (),
    "inductor": (),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
    "jax": ("jax",),
}
CONTENDERS: tuple[str, ...] = (
    "torch-fp32",
    "torch-bf16",
    "torch-int8",
    "inductor-fp32",
    "inductor-bf16",
    "onnxruntime-fp32",
    "onnxruntime-int8",
    "openvino-f32",
    "openvino-bf16",
    "openvino-int8",
)
LAYERS_ONLY: tuple[str, ...] = ("jax-fp32",)
"""Contenders that know a dense layer and no model; timed where they are asked for by name."""


def missing(name: str) -> str | None:
    """Say how to install what engine `name` needs, or None if everything is there.

    Raises:
        ValueError: if `name` is not one of `CONTENDERS` or `LAYERS_ONLY`.
    """
    family, precision = _split(name)
    if family == "inductor" and not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h, which inductor compiles against, not found: install the package python3-dev"
    packages = _REQUIRES[family] + (("nncf",) if (family, precision) == ("openvino", "int8") else ())
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{', '.join(absent)} not installed: pip install 'nogemm[peers]'" if absent else None


def engine(name: str) -> Engine:
    """Make the engine of that name; its packages are imported now and not before.

    Raises:
        ValueError: if `name` is not one of `CONTENDERS` or `LAYERS_ONLY`.
        ModuleNotFoundError: if a package is absent; `missing` tells beforehand.
    """
    family, precision = _split(name)
    reason = missing(name)
    if reason is not None:
        raise ModuleNotFoundError(reason)
    return importlib.import_module(_MODULES[family]).make(precision)


def _split(name: str) -> tuple[str, str]:
    if name not in (*CONTENDERS, *LAYERS_ONLY):
        raise ValueError(f"unknown contender {name!r}; known: {', '.join((*CONTENDERS, *LAYERS_ONLY))}")
    family, _, precision = name.partition("-")
    return family, precision
