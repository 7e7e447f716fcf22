"""The precision in which a host computes the rest of a model: chosen by what this processor does faster.

Measured once per machine, version of OpenVINO and instruction set that OpenVINO is held to, and kept in the user's
cache folder as `nogemm.hardware.speeds` are.

Legend: N tokens, D width.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import math
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from nogemm.errors import ConfigError
from nogemm.export.openvino_host import computes_bf16, shared_core
from nogemm.files import cache_folder, parse_json, write_json
from nogemm.hardware.cpu import machine, usable_cores

RESTS = ("auto", "float", "int8")
FORMAT = 1
WIDTH, TOKENS, ROUNDS = 768, (128, 1024), 9
# int8 costs about 0.003 of agreement, so it has to be worth it.
_WORTH = 1.1
# oneDNN, OpenVINO's library of products, is held to an instruction set by these.
_FORCED = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@dataclass(frozen=True)
class Rest:
    """The chosen precision, "float" or "int8", and why."""

    precision: str
    reason: str


def choose_rest(rest: str, int8: bool | None, calibrated: bool) -> Rest:
    """Choose the precision of what OpenVINO computes itself.

    Args:
        rest: "float", "int8", or "auto": what is faster here, float where int8 cannot be calibrated.
        int8: True is rest="int8", False rest="float"; None leaves it to `rest`.
        calibrated: whether there is a tokenizer and a text.
    Raises:
        ConfigError: an unknown `rest`, one that `int8` contradicts, or int8 without texts.
    """
    if rest not in RESTS:
        raise ConfigError(f"export: rest must be one of {', '.join(RESTS)}, got rest={rest!r}")
    if int8 is not None:
        asked = "int8" if int8 else "float"
        if rest not in ("auto", asked):
            raise ConfigError(f"export: int8={int8} and rest={rest!r} contradict each other; give one of them")
        rest = asked
    if rest == "int8" and not calibrated:
        raise ConfigError("export: an int8 rest is calibrated on texts: give tokenizer=... and calibration=[texts]")
    if rest != "auto":
        return Rest(rest, "as asked")
    if not calibrated:
        return Rest("float", "int8 needs a tokenizer and texts to calibrate on")
    if importlib.util.find_spec("nncf") is None:
        return Rest("float", "int8 needs nncf, which is not installed")
    gain = math.prod(int8_gain().values()) ** (1 / len(TOKENS))
    said = f"int8 products take {1 / gain:.2f} of the time of float ones here"
    return Rest("int8", said) if gain >= _WORTH else Rest("float", said)


def int8_gain() -> dict[int, float]:
    """Return {N: time in float / time in int8} of OpenVINO's products of N tokens: remembered, or measured, seconds."""
    return _gain_of(*(os.environ.get(name, "") for name in _FORCED))


@functools.cache
def _gain_of(*forced: str) -> dict[int, float]:
    facts = machine()
    told = [FORMAT, facts["cpu"], facts["model"], facts["caches"], usable_cores(), forced, version("openvino")]
    file = cache_folder() / f"rest-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"
    try:
        return _read(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = measure_int8_gain()
    with contextlib.suppress(OSError):
        write_json(file, {str(n): gain for n, gain in found.items()})
    return found


def _read(file: Path) -> dict[int, float]:
    values = parse_json(file.read_text(encoding="utf-8"))
    found = {n: float(values[str(n)]) for n in TOKENS}
    if not all(math.isfinite(gain) and gain > 0 for gain in found.values()):
        raise ValueError(f"{file}: not positive numbers")
    return found


def measure_int8_gain() -> dict[int, float]:
    """Time four products as attention has them, in float and int8 in turn, on all usable cores."""
    requests = [_request(int8) for int8 in (False, True)]
    gains = {}
    for tokens in TOKENS:
        x_ND = np.random.default_rng(1).standard_normal((tokens, WIDTH), dtype=np.float32)
        times: list[list[float]] = [[], []]
        for turn in range(ROUNDS + 1):  # the first is not counted
            for request, kept in zip(requests, times, strict=True):
                start = time.perf_counter()
                request.infer([x_ND], share_inputs=True)
                if turn:
                    kept.append(time.perf_counter() - start)
        gains[tokens] = min(times[0]) / min(times[1])  # other work only takes away
    return gains


def _request(int8: bool) -> Any:
    """Compile x -> (x Q + x K + x V) O as a user would, int8 with activations quantised before each product."""
    import openvino
    from openvino import opset15 as ov

    x = ov.parameter([-1, WIDTH], np.float32, name="x")
    weights = np.random.default_rng(0).standard_normal((4, WIDTH, WIDTH), dtype=np.float32) / WIDTH**0.5

    def ranged(node: Any, most: float) -> Any:
        low, high = ov.constant(np.float32(-most)), ov.constant(np.float32(most * 127 / 128))
        return ov.fake_quantize(node, low, high, low, high, 256) if int8 else node

    def product(node: Any, weight_DD: np.ndarray) -> Any:
        return ov.matmul(node, ranged(ov.constant(weight_DD), float(np.abs(weight_DD).max())), False, True)

    seen = ranged(x, 4.0)
    query, key, value = (product(seen, weight_DD) for weight_DD in weights[:3])
    y = product(ranged(ov.add(ov.add(query, key), value), 8.0), weights[3])
    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": usable_cores(), "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    config["INFERENCE_PRECISION_HINT"] = "bf16" if computes_bf16() else "f32"  # its own choice, left alone
    model = openvino.Model([y.output(0)], [x], "rest")  # type: ignore[misc]
    return shared_core().compile_model(model, "CPU", config).create_infer_request()
