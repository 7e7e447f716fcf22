"""The operator alone, in OpenVINO: the same bits as torch's, any shape, any instruction set; damage is noticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch

import nogemm
from nogemm import ops
from nogemm.export.openvino_host import shared_core

D, D_OUT = 40, 24
LOOKUP = nogemm.LookupConfig(tables=8, bits=5, projection=nogemm.BHConfig(rounds=2, block=16))
CONFIGS: dict[str, Any] = {
    "lookup": LOOKUP,
    "tree": nogemm.TreeConfig(trees=2, depth=4),
    "hire": nogemm.HireConfig(keep=0.2, sketch="int4"),
}


def packed_layer(kind: str, dtype: str) -> Any:
    torch.manual_seed(1)
    layer = CONFIGS[kind].build(D, D_OUT, hidden=90, activation="relu")
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer.eval().pack(dtype, path="rows")


def graph(packed: np.ndarray, library: Path, *, d_out: int = D_OUT, width: int = D) -> Any:
    """Build a model that is the operator alone, x [any, any, width]."""
    from openvino import opset15 as ov
    from openvino.utils.node_factory import NodeFactory

    factory = NodeFactory()
    factory.add_extension(str(library))
    x = ov.parameter([-1, -1, width], np.float32, name="x")
    node = factory.create("PackedFFN", [x.output(0), ov.constant(packed).output(0)], {"d_out": d_out})
    return openvino.Model([node.output(0)], [x], "operator")  # type: ignore[misc]


def compile_model(model: Any, threads: int = 1) -> Any:
    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return shared_core().compile_model(model, "CPU", config)


def bits(y: np.ndarray | torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(y).view(np.uint32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_the_same_bits_as_in_torch(kind: str, dtype: str, threads: int, library: Path) -> None:
    layer = packed_layer(kind, dtype)
    compiled = compile_model(graph(layer.get_buffer("packed").numpy(), library), threads)
    for shape in ((1, 1), (3, 7), (2, 150), (1, 600), (0, 5)):
        x = torch.randn(*shape, D)
        y = compiled([x.numpy()])[0]
        assert y.shape == (*shape, D_OUT)
        assert np.array_equal(bits(y), bits(layer(x)))


def test_bits_of_another_layer_are_not_the_same(library: Path) -> None:
    layer, x = packed_layer("lookup", "int8"), torch.randn(3, 7, D)
    other = packed_layer("lookup", "bf16")
    y = compile_model(graph(other.get_buffer("packed").numpy(), library))([x.numpy()])[0]
    assert not np.array_equal(bits(y), bits(layer(x)))


def test_models_that_take_turns_keep_their_own_weights(library: Path) -> None:
    """Buffers that are freed and made again get the same addresses: no model may see another's weights."""
    x = torch.randn(2, 3, D)
    for dtype in ("int8", "bf16", "int8", "fp32", "bf16"):
        layer = packed_layer("lookup", dtype)
        compiled = compile_model(graph(layer.get_buffer("packed").numpy().copy(), library))
        assert np.array_equal(bits(compiled([x.numpy()])[0]), bits(layer(x)))


def run_forced(isa: str, model: Path, library: Path, x: np.ndarray) -> np.ndarray:
    """Run a saved model in a fresh process under a forced instruction set."""
    np.save(model.with_name("x.npy"), x)
    code = (
        "import ctypes, sys, numpy, openvino\n"
        "model, library, folder = sys.argv[1:]\n"
        "core = openvino.Core(); core.add_extension(library)\n"
        "native = ctypes.CDLL(library); native.nogemm_isa.restype = ctypes.c_char_p\n"
        "compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})\n"
        "y = compiled([numpy.load(folder + '/x.npy')])[0]\n"
        "numpy.save(folder + '/y.npy', y)\n"
        "assert 'torch' not in sys.modules\n"
        "print(native.nogemm_isa().decode())"
    )
    words = [sys.executable, "-c", code, str(model), str(library), str(model.parent)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"NOGEMM_ISA": isa}, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
    return np.load(model.with_name("y.npy"))


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_one_file_runs_on_every_instruction_set(dtype: str, library: Path, tmp_path: Path) -> None:
    """The file written here, under the best set, is read by processes that have another one."""
    layer, x = packed_layer("lookup", dtype), torch.randn(3, 50, D)
    openvino.save_model(graph(layer.get_buffer("packed").numpy(), library), tmp_path / "m.xml", compress_to_fp16=False)
    for isa in ops.supported_isas():
        with ops.use_isa(isa):
            assert np.array_equal(bits(run_forced(isa, tmp_path / "m.xml", library, x.numpy())), bits(layer(x))), isa


RESIDENT = """
import re, sys, numpy, openvino

def resident():
    blocks = re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read())
    mine = [block for block in blocks if block.splitlines()[0].endswith("m.bin")]
    return sum(int(re.search(r"Rss: +(\\d+)", block)[1]) for block in mine) * 1024

core = openvino.Core()
core.add_extension(sys.argv[2])
model = core.read_model(sys.argv[1])
packed = next(node for node in model.get_ops() if node.get_type_name() == "Constant")
packed.data.max()
before = resident()
compiled = core.compile_model(model, "CPU")
compiled([numpy.ones((1, 1, int(sys.argv[3])), numpy.float32)])
print(before, resident(), packed.data.size)
"""


def test_weights_are_in_memory_once(library: Path, tmp_path: Path) -> None:
    """The operator copies a layer out of the mapped file, whose pages then are not this process's any more."""
    config = nogemm.LookupConfig(tables=64, bits=8, projection=nogemm.BHConfig(rounds=1, block=16))
    packed = config.build(D, 256).eval().pack("fp32").get_buffer("packed").numpy()
    openvino.save_model(graph(packed, library, d_out=256), tmp_path / "m.xml", compress_to_fp16=False)
    words = [sys.executable, "-c", RESIDENT, str(tmp_path / "m.xml"), str(library), str(D)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    before, after, size = (int(word) for word in done.stdout.split())
    assert size > 16 << 20
    assert before > 0.9 * size
    assert after < 0.1 * size


def test_an_unknown_instruction_set_is_named(library: Path, tmp_path: Path) -> None:
    layer = packed_layer("lookup", "fp32")
    openvino.save_model(graph(layer.get_buffer("packed").numpy(), library), tmp_path / "m.xml", compress_to_fp16=False)
    with pytest.raises(AssertionError, match="avx1024"):
        run_forced("avx1024", tmp_path / "m.xml", library, np.zeros((1, 1, D), np.float32))


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_damage_is_noticed_when_the_model_is_built(kind: str, library: Path) -> None:
    packed = packed_layer(kind, "fp32").get_buffer("packed").numpy()
    strange = packed.copy()
    strange[0] ^= 1
    for bad in (strange, packed[:-64], packed[:8]):
        with pytest.raises(RuntimeError, match=r"nogemm: this library cannot run .*(not a packed|damaged)"):
            graph(bad, library)
    with pytest.raises(RuntimeError, match=f"takes width {D}, x has width {D + 1}"):
        graph(packed, library, width=D + 1)
    with pytest.raises(RuntimeError, match=f"gives width {D_OUT}, d_out is {D_OUT - 1}"):
        graph(packed, library, d_out=D_OUT - 1)


def test_a_packed_layer_of_another_version_is_refused(library: Path) -> None:
    packed = packed_layer("lookup", "fp32").get_buffer("packed").numpy().copy()
    packed[16] += 1
    with pytest.raises(RuntimeError, match="packed by version 4 of the format, this is version 3"):
        graph(packed, library)
