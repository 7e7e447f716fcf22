"""Holding a process to an instruction set: the engines obey, and one that does not is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nogemm import ops
from nogemm.errors import ConfigError
from nogemm.hardware import held, hold
from nogemm.hardware.cpu import processor
from nogemm.hardware.held import LEVELS, VARIABLES, held_to, variables

HERE = [isa for isa in LEVELS if isa in ops.supported_isas()]
needs_avx2 = pytest.mark.skipif(not HERE, reason="no AVX2 here")
needs_more = pytest.mark.skipif(len(HERE) < 2, reason="nothing above AVX2 here")


def run(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in VARIABLES} | environment
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, check=False)


def test_the_table_names_a_value_for_every_level() -> None:
    for name, values in VARIABLES.items():
        assert tuple(values) == LEVELS, name
    assert variables("avx2", {"XLA_FLAGS": "--mine"})["XLA_FLAGS"] == "--mine --xla_cpu_max_isa=AVX2"
    with pytest.raises(ConfigError, match=r"--isa must be one of avx2, .*, got 'sse9'"):
        variables("sse9", {})


def test_a_process_is_held_by_the_whole_table(monkeypatch: pytest.MonkeyPatch) -> None:
    own = processor()
    for name, value in variables("avx2", {}).items():
        monkeypatch.setenv(name, value)
    assert held_to() == "avx2"
    assert processor() == f"{own.removesuffix('-avx2')}-avx2"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    assert held_to() is None


@needs_avx2
def test_nothing_above_the_level_is_offered() -> None:
    done = run(["-c", "from nogemm import ops; print(*ops.supported_isas(), ops.isa())"], NOGEMM_MAX_ISA="avx2")
    assert done.stdout.split() == ["scalar", "avx2", "avx2"], done.stderr
    done = run(["-c", "import nogemm.ops"], NOGEMM_MAX_ISA="avx9")
    assert "NOGEMM_MAX_ISA=avx9 is unknown" in done.stderr


@needs_more
def test_a_kernel_above_the_level_is_refused() -> None:
    done = run(["-c", "from nogemm import ops; ops.set_isa('avx512')"], NOGEMM_MAX_ISA="avx2")
    assert "'avx512' is above NOGEMM_MAX_ISA=avx2" in done.stderr


@needs_avx2
def test_a_command_starts_held_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "env.json"
    done = run(["-m", "nogemm", "--isa", "avx2", "env", "--json", str(file)])
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said[0] == "held to avx2:"
    assert {"  nogemm: avx2", "  ATen: AVX2", "  inductor: avx2", "  FBGEMM: sums of 16 bits"} <= set(said)
    assert any("not held, ONNX Runtime" in line for line in said)
    found = json.loads(file.read_text())
    assert found["isa"] == "avx2"
    assert found["line"].endswith("held to avx2")


@needs_more
@pytest.mark.parametrize("name", ["NOGEMM_MAX_ISA", "ATEN_CPU_CAPABILITY", "FBGEMM_ENABLE_INSTRUCTIONS"])
def test_an_engine_that_does_not_obey_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = {"NOGEMM_MAX_ISA": "nogemm", "ATEN_CPU_CAPABILITY": "ATen", "FBGEMM_ENABLE_INSTRUCTIONS": "FBGEMM"}[name]
    if engine == "FBGEMM" and HERE[-1] == "avx512":
        pytest.skip("sums are as narrow without VNNI")
    whole = held.variables

    def without(isa: str, environment: dict[str, str]) -> dict[str, str]:
        return {key: value for key, value in whole(isa, environment).items() if key != name}

    monkeypatch.setattr(hold, "variables", without)
    for key in VARIABLES:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ConfigError, match=f"--isa avx2: {engine} is not held to it"):
        hold.obeyed("avx2")


@pytest.mark.parametrize(
    ("engine", "isa", "answer", "right"),
    [
        ("oneDNN", "avx2", "Intel AVX2", True),
        ("oneDNN", "avx2", "Intel AVX2 with Intel DL Boost", False),
        ("oneDNN", "avx2", "Intel AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions", False),
        ("oneDNN", "avx512", "Intel AVX-512 with Intel DL Boost", False),
        ("OpenVINO", "avx2", "brgemm_avx512_f32", False),
        ("OpenVINO", "avx2", "gemm_mlas_f32", False),
        ("OpenVINO", "avx512_vnni", "brgemm_avx512_bf16", False),
        ("MKL", "avx2", "Intel(R) Advanced Vector Extensions 512 (Intel(R) AVX-512)", False),
        ("MKL", "avx2", "Intel(R) Architecture", True),
        ("nogemm", "avx512", "avx2", False),
    ],
)
def test_answers_are_read(engine: str, isa: str, answer: str, right: bool) -> None:
    assert hold.fits(engine, isa, answer) is right
