"""The OpenVINO extension library: one small source file, compiled on first use against the OpenVINO that is installed.

The package carries the kernels as a static library, which needs neither torch nor OpenVINO; only the operator's class
depends on OpenVINO's C++ interface, which changes with every release. So it is compiled (seconds) when somebody
exports, and kept in the user's cache, under a name that says for which OpenVINO, kernels and compiler.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

from nogemm.errors import NativeError
from nogemm.files import cache_folder

LIBRARY = "libnogemm_openvino.so"
_SOURCE, _KERNELS = "extension.cpp", "libnogemm_kernels.a"
_BUILD = "1"  # raise when the command below changes, so that libraries in the cache are made again
_HEADERS = (
    "head.h",
    "host.h",
    "packed/head/host.h",
    "packed/host/activations.h",
    "packed/host/host.h",
    "packed/lookup/pack.h",
    "packed/neurons/host.h",
    "packed/tree/pack.h",
    "weights.h",
)
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden")


def extension_path() -> Path:
    """Return the extension library for the installed OpenVINO; compile it if this is the first time.

    The file lies in $NOGEMM_CACHE, or in nogemm's folder of the user's cache.

    Raises:
        NativeError: openvino, a C++ compiler or nogemm's own native build is absent, or the compiler failed.
    """
    parts = host_parts()
    include, libraries = _openvino()
    compiler = _compiler()
    sources = [parts / name for name in (_SOURCE, _KERNELS, *_HEADERS)]
    content = hashlib.sha256("\0".join((compiler, *_FLAGS, *(path.name for path in libraries), _BUILD)).encode())
    for path in sources:
        content.update(path.read_bytes())
    target = cache_folder() / f"openvino-{content.hexdigest()[:16]}" / LIBRARY
    if not target.exists():
        _build(compiler, parts, include, libraries, target)
    return target


def host_parts() -> Path:
    """Return the folder that holds the kernels as a static library, and the operator's source.

    Raises:
        NativeError: nogemm was installed without its native extension.
    """
    spec = importlib.util.find_spec("nogemm._native")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "host"
    if folder is None or not (folder / _KERNELS).exists():
        raise NativeError("export: nogemm was built without its native kernels; install it with a C++ compiler present")
    return folder


def _openvino() -> tuple[Path, list[Path]]:
    """Return OpenVINO's headers and the libraries to link, by their versioned names."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        raise NativeError("export: openvino is not installed: pip install 'nogemm[openvino]'")
    root = Path(next(iter(spec.submodule_search_locations)))
    found = [sorted((root / "libs").glob(pattern)) for pattern in ("libopenvino.so.*", "libtbb.so.*")]
    if not (root / "include" / "openvino").is_dir() or not all(found):
        raise NativeError("export: the openvino package has no headers or libraries: pip install 'openvino>=2025.0'")
    return root / "include", [paths[-1] for paths in found]


def _compiler() -> str:
    chosen = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if chosen is None or shutil.which(chosen) is None:
        named = f"CXX={chosen} is not there" if chosen else "a C++ compiler is missing"
        raise NativeError(f"export: {named}: install g++ (or set CXX); the OpenVINO operator is compiled on first use")
    return chosen


def _build(compiler: str, parts: Path, include: Path, libraries: list[Path], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    sibling = target.with_name(f".{target.name}.{os.getpid()}.new")
    command = [
        compiler,
        *_FLAGS,
        *("-isystem", str(include)),
        f"-I{parts}",
        str(parts / _SOURCE),
        # All of it: the entry points of the C interface are found by name.
        *("-Wl,--whole-archive", str(parts / _KERNELS), "-Wl,--no-whole-archive"),
        *(str(path) for path in libraries),
        # Torch's extension holds functions of the same names in the same process: ours call ours. The library stays
        # loaded once it is: a model's nodes and a thread's scratch outlive whoever opened it.
        *("-Wl,-Bsymbolic", "-Wl,-z,defs", "-Wl,-z,nodelete", "-o", str(sibling)),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            raise NativeError(f"export: {compiler} could not build the OpenVINO operator: {' '.join(lines[:3])}")
        sibling.replace(target)
    finally:
        sibling.unlink(missing_ok=True)
