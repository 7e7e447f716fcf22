"""The native extension: it is there, it can be forced, and what cannot be had is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nogemm import ops
from nogemm.errors import NativeError


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_extension_is_built() -> None:
    """A build that silently lacks its kernels must fail here, not pass everywhere."""
    assert ops.native_available()
    assert "scalar" in ops.supported_isas()


CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.parametrize("file", sorted([*CSRC.glob("tests/*.cpp"), *CSRC.glob("dev/*.cpp")]), ids=lambda f: f.stem)
def test_what_the_extension_does_not_compile_compiles(file: Path) -> None:
    """The C++ tests are built with sanitizers, by --extra alone; a name that they miss shows here."""
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    include = Path(torch.__file__).parent / "include"
    words = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wshadow", "-Werror", f"-I{CSRC}"]
    done = subprocess.run([*words, f"-I{include}", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ops.supported_isas())
def test_forced_isa_takes_effect(name: str) -> None:
    result = run_python("from nogemm import ops; print(ops.isa())", NOGEMM_ISA=name)
    assert result.stdout.strip() == name, result.stderr


def test_unknown_isa_is_an_error() -> None:
    result = run_python("import nogemm.ops", NOGEMM_ISA="avx1024")
    assert result.returncode != 0
    assert "NOGEMM_ISA=avx1024 cannot be used" in result.stderr
    with pytest.raises(NativeError, match="avx1024"):
        ops.set_isa("avx1024")


def test_native_can_be_disabled() -> None:
    code = "from nogemm import ops; import torch; print(ops.isa(), ops.hadamard(torch.ones(2)).tolist()[1])"
    result = run_python(code, NOGEMM_DISABLE_NATIVE="1")
    assert result.stdout.strip() == "reference 0.0", result.stderr
