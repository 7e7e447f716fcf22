"""What holds every engine of a process to an instruction set that the machine exceeds: the one table of variables.

Libraries read them when they load, so a held process is a new one; `nogemm.hardware.hold` starts it and sees that the
engines obey. What has no variable is named in `NOT_HELD`; an emulated processor holds that, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from nogemm.errors import ConfigError

LEVELS = ("avx2", "avx512", "avx512_vnni", "avx512_bf16")

# MKL reads its variable on Intel's processors; on others it has one set of kernels, which needs AVX2 at most. OpenVINO
# needs its own variable and that of the oneDNN inside it: with the second alone no matrix product compiles.
VARIABLES: dict[str, dict[str, str]] = {
    "NOGEMM_MAX_ISA": {level: level for level in LEVELS},
    "ATEN_CPU_CAPABILITY": {"avx2": "avx2"} | dict.fromkeys(LEVELS[1:], "avx512"),
    "TORCHINDUCTOR_CPP_MARCH": {
        "avx2": "x86-64-v3",
        "avx512": "x86-64-v4",
        "avx512_vnni": "cascadelake",
        "avx512_bf16": "cooperlake",
    },
    "ONEDNN_MAX_CPU_ISA": {
        "avx2": "AVX2",
        "avx512": "AVX512_CORE",
        "avx512_vnni": "AVX512_CORE_VNNI",
        "avx512_bf16": "AVX512_CORE_BF16",
    },
    "FBGEMM_ENABLE_INSTRUCTIONS": {"avx2": "AVX2", "avx512": "AVX512"} | dict.fromkeys(LEVELS[2:], "AVX512_VNNI"),
    "MKL_ENABLE_INSTRUCTIONS": {"avx2": "AVX2"} | dict.fromkeys(LEVELS[1:], "AVX512"),
    "OV_CPU_MAX_ISA": {
        "avx2": "AVX2",
        "avx512": "AVX512_CORE",
        "avx512_vnni": "AVX512_CORE_VNNI",
        "avx512_bf16": "AVX512_CORE_BF16",
    },
    "XLA_FLAGS": {level: f"--xla_cpu_max_isa={level.upper()}" for level in LEVELS},
}
NOT_HELD = {
    "ONNX Runtime": "it reads no variable",
    "OpenVINO's f32 products that no activation follows": "MLAS, which it calls for them, reads no variable",
    "JAX's products": "YNNPACK, which XLA calls for them, reads no variable",
}


def variables(isa: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that hold a process to `isa`; what `XLA_FLAGS` already holds stays in front.

    Raises:
        ConfigError: `isa` is none of `LEVELS`.
    """
    if isa not in LEVELS:
        raise ConfigError(f"--isa must be one of {', '.join(LEVELS)}, got {isa!r}")
    found = {name: values[isa] for name, values in VARIABLES.items()}
    found["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {found['XLA_FLAGS']}".strip()
    return found


def held_to() -> str | None:
    """Name what this process is held to, or None: every variable of the table is set for one level."""
    isa = os.environ.get("NOGEMM_MAX_ISA")
    if isa not in LEVELS:
        return None
    names = variables(isa, {})
    whole = all(value in os.environ.get(name, "") for name, value in names.items())
    return isa if whole else None
