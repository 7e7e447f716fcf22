"""Start a command with every engine held to an instruction set, once each has shown that it obeys.

    python -m nogemm.hardware.hold avx2 COMMAND...

says what each engine is held to, fails where one does not obey, and then becomes the command; `nogemm --isa avx2 ...`
does the same with itself.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

from nogemm.errors import ConfigError
from nogemm.hardware.held import NOT_HELD, variables


def obeyed(isa: str) -> dict[str, str]:
    """Ask every engine that is installed what it runs: {engine: what it answered}.

    They are asked in new processes with the variables set (some seconds in all).

    Raises:
        ConfigError: one did not obey, or the machine lacks `isa` itself; the text names the engine and its answer.
    """
    environment = _environment(isa) | {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    answers: dict[str, str] = {}
    for code in (_ASK_TORCH, _ASK_OPENVINO):
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ConfigError(f"--isa {isa}: the engines could not be asked: {last}")
        answers |= _answers(done.stdout)
    for engine, answer in answers.items():
        if not fits(engine, isa, answer):
            raise ConfigError(f"--isa {isa}: {engine} is not held to it, it answers {answer!r}")
    return answers


def lines(isa: str, answers: Mapping[str, str]) -> list[str]:
    """Write for a reader what is held to `isa`, and what is not."""
    shown = [f"held to {isa}:"] + [f"  {engine}: {answer}" for engine, answer in answers.items()]
    return shown + [f"  not held, {engine}: {why}" for engine, why in NOT_HELD.items()]


# torch's int8 products (FBGEMM) do not say what they run on: without VNNI 255 * 127, twice, is more than 16 bits hold.
_ASK_TORCH = """
import warnings
import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa
from nogemm import ops

warnings.simplefilter("ignore")
print("nogemm=" + ops.isa())
print("ATen=" + torch.backends.cpu.get_cpu_capability())
print("inductor=" + str(pick_vec_isa() or "none"))
torch.ones(9, 9) @ torch.ones(9, 9)
torch.mkldnn_convolution(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1), None, (0, 0), (1, 1), (1, 1), 1)
weight = torch.quantize_per_tensor(torch.full((8, 64), 127.0), 1.0, 0, torch.qint8)
packed = torch.ops.quantized.linear_prepack(weight, None)
y = torch.ops.quantized.linear_dynamic(torch.full((4, 64), 255.0), packed, False)
print("FBGEMM=" + ("sums of 16 bits" if float(y[0, 0]) < 64 * 127 * 254 else "sums of 32 bits"))
"""
_ASK_OPENVINO = """
import importlib.util, sys
if importlib.util.find_spec("openvino") is None:
    sys.exit()
import numpy as np, openvino as ov
from openvino import opset13 as op

x = op.parameter([16, 256], np.float32)
weight = np.linspace(-1, 1, 256 * 256, dtype=np.float32).reshape(256, 256)
model = ov.Model([op.relu(op.matmul(x, op.constant(weight), False, True))], [x])
nodes = [n.get_rt_info() for n in ov.Core().compile_model(model, "CPU").get_runtime_model().get_ops()]
text = lambda value: str(getattr(value, "value", value))
print("OpenVINO=" + " ".join(text(n["primitiveType"]) for n in nodes if text(n["layerType"]) == "FullyConnected"))
"""
_SAID = {"oneDNN": r"cpu,isa:(.*)", "MKL": r"oneMKL.*architecture (.*) processors"}


def _answers(printed: str) -> dict[str, str]:
    """Take the answers out of what a process printed: our own lines, and what oneDNN and MKL say of themselves."""
    found = dict(re.findall(r"^(\w+)=(.*)$", printed, re.MULTILINE))
    for engine, pattern in _SAID.items():
        said = re.search(pattern, printed)
        if said is not None:
            found[engine] = said.group(1)
    return found


def fits(engine: str, isa: str, answer: str) -> bool:
    """Say whether an engine's answer is what a processor with `isa` and no more would give."""
    words = answer.lower()
    if engine == "nogemm":
        return answer == isa
    if engine == "FBGEMM":
        return ("16" in words) == (isa in ("avx2", "avx512"))
    if engine == "MKL":  # "Intel(R) Architecture" on processors of others
        return isa != "avx2" or "512" not in words
    if isa == "avx2":
        return "avx2" in words and not any(word in words for word in ("512", "bf16", "vnni", "dl boost", "amx"))
    # torch and inductor tell AVX-512 from what is less, and no more.
    above = {"avx512": ("dl boost", "bfloat16", "bf16"), "avx512_vnni": ("bfloat16", "bf16")}.get(isa, ())
    return "512" in words and not any(word in words for word in (*above, "amx"))


def main(words: Sequence[str]) -> None:
    """Become the command `words[1:]`, held to `words[0]`."""
    if len(words) < 2:
        raise SystemExit("usage: python -m nogemm.hardware.hold ISA COMMAND...")
    isa = words[0]
    try:
        answers = obeyed(isa)
    except ConfigError as error:
        raise SystemExit(f"hold: {error}") from None
    print("\n".join(lines(isa, answers)), flush=True)
    become(isa, list(words[1:]))


def become(isa: str, command: list[str]) -> None:
    """Replace this process by `command` with the variables of `isa` set."""
    sys.stdout.flush()
    os.execvpe(command[0], command, _environment(isa))


def _environment(isa: str) -> dict[str, str]:
    environment = {**os.environ, **variables(isa, os.environ)}
    environment.pop("NOGEMM_ISA", None)
    return environment


if __name__ == "__main__":
    main(sys.argv[1:])
