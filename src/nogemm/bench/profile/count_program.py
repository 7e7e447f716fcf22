"""The program that a simulator runs: one packed layer, a number of calls, nothing else.

The package carries its source and the kernels as a static library, which needs no torch; it is compiled on first use
(seconds) and kept in the user's cache, under a name that says for which kernels and compiler.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from nogemm.errors import NativeError
from nogemm.export.extension import host_parts
from nogemm.files import cache_folder

_SOURCE, _KERNELS = "count_calls.cpp", "libnogemm_kernels.a"
_HEADERS = ("packed/host/phases.h", "packed/host/host.h")
_FLAGS = ("-std=c++17", "-O2")


def count_program() -> Path:
    """Return the program; compile it if this is the first time.

    Raises:
        NativeError: no C++ compiler, no native build of nogemm, or the compiler failed.
    """
    parts = host_parts()
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise NativeError("profile: a C++ compiler is missing: install g++ (or set CXX), or take --counters none")
    content = hashlib.sha256("\0".join((compiler, *_FLAGS)).encode())
    for name in (_SOURCE, _KERNELS, *_HEADERS):
        content.update((parts / name).read_bytes())
    target = cache_folder() / f"profile-{content.hexdigest()[:16]}" / "count_calls"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    sibling = target.with_name(f".{target.name}.{os.getpid()}.new")
    words = [compiler, *_FLAGS, f"-I{parts}", str(parts / _SOURCE), str(parts / _KERNELS), "-o", str(sibling)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NativeError(f"profile: {compiler} could not build count_calls: {done.stderr.strip()[:300]}")
        sibling.replace(target)
    finally:
        sibling.unlink(missing_ok=True)
    return target


def count_command(
    program: Path, *, kind: int, phase: int, batch: int, copies: int, calls: int, packed: Path, tokens: Path
) -> Callable[[bool], Sequence[str]]:
    """Return the program's command line; its argument: whether the layers are read through before the first call."""

    def command(touch: bool) -> Sequence[str]:
        numbers = (kind, phase, batch, copies, calls, int(touch))
        return [str(program), *map(str, numbers), str(packed), str(tokens)]

    return command
