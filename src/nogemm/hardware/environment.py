"""Say what runs here: the instruction set in force, threads, versions, caches; the first thing a bug report needs."""

from __future__ import annotations

from typing import Any

import torch

from nogemm import ops
from nogemm.hardware.cpu import machine, machine_line
from nogemm.hardware.speeds import PRODUCT_TOKENS, speeds
from nogemm.version import __version__


def env() -> dict[str, Any]:
    """Return what nogemm runs on as JSON values.

    Returns:
        nogemm: its version; native: whether the compiled kernels are loaded; isa: the instruction set in force
        ("reference" without kernels); isas: those that this machine and build support; threads: torch's;
        matrix_libraries: what torch's own products use; line: the machine in one line; machine: every fact known;
        paths: {dtype: {tokens: the share of its neurons that a token may name before a packed layer of neurons answers
        with the product of all}}, from `nogemm.hardware.speeds` (measured at the first call); None without kernels.
    """
    known = speeds()

    return {
        "nogemm": __version__,
        "native": ops.native_available(),
        "isa": ops.isa(),
        "isas": list(ops.supported_isas()),
        "threads": torch.get_num_threads(),
        "matrix_libraries": {
            "mkl": torch.backends.mkl.is_available(),
            "onednn": torch.backends.mkldnn.is_available(),
            "openmp": torch.backends.openmp.is_available(),
        },
        "line": machine_line(),
        "machine": machine(),
        "paths": known and {d: {n: known.break_even(d, n) for n in PRODUCT_TOKENS} for d in known.rows_ns},
    }
