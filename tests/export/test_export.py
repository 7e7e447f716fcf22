"""From a converted model to a directory, and from there into fresh processes that know neither torch nor nogemm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_export import LOOKUP, TEXTS, build

import nogemm
from nogemm.convert.sites import installed
from nogemm.export import extension
from nogemm.export.samples import INPUTS
from nogemm.export.traced import host_model
from nogemm.layers import TokenTableFFN

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "README.md",
    "config.json",
    "libnogemm_openvino.so",
    "nogemm_export.json",
    "openvino_model.bin",
    "openvino_model.xml",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Plain OpenVINO, as the README in the directory shows it.
READER = """
import sys, numpy, openvino
folder, threads = sys.argv[1], int(sys.argv[2])
core = openvino.Core()
core.add_extension(folder + "/libnogemm_openvino.so")
config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
model = core.compile_model(folder + "/openvino_model.xml", "CPU", config)
inputs = numpy.load(folder + "/inputs.npz")
found = {}
names = [x.get_any_name() for x in model.inputs]
for i in range(len(inputs.files) // len(names)):
    found[str(i)] = model({name: inputs[f"{name}{i}"] for name in names})[0].copy()
numpy.savez(folder + "/outputs.npz", **found)
assert not {"torch", "nogemm"} & set(sys.modules)
"""


def read(folder: Path, batches: list[tuple[torch.Tensor, ...]], threads: int = 1, **env: str) -> list[torch.Tensor]:
    """Run batches of ids, mask and perhaps types (else 0) through an exported directory in a fresh process."""
    names = json.loads((folder / "nogemm_export.json").read_text())["inputs"]
    arrays = {
        f"{name}{i}": x.numpy()
        for i, batch in enumerate(batches)
        for name, x in zip(names, (*batch, torch.zeros_like(batch[0])), strict=False)
    }
    np.savez(folder / "inputs.npz", allow_pickle=False, **arrays)
    words = [sys.executable, "-c", READER, str(folder), str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | env, check=False)
    assert done.returncode == 0, done.stderr
    outputs = np.load(folder / "outputs.npz")
    return [torch.from_numpy(outputs[str(i)]) for i in range(len(batches))]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Several shapes, one with padding."""
    found = []
    for shape in ((1, 1), (2, 7), (5, 33), (1, 64)):
        ids = torch.randint(5, 45, shape)
        found.append((ids, torch.ones_like(ids)))
    ids, mask = found[1]
    mask = mask.clone()
    mask[0, 4:] = 0
    return [*found, (ids, mask)]


def close(found: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> float:
    """Return the share of tokens that agree to float32 rounding.

    Outputs come out of a LayerNorm, so they are of size 1; the two engines add in other orders, which costs some
    hundred roundings of 2^-24 in two layers: 1e-4 is ten times that. A token whose hash sees a number within that
    rounding of zero reads another row; that may happen to a few, so callers say how many must agree.
    """
    good = (found - expected).abs().amax(-1) < 1e-4
    return float(good[mask.bool()].float().mean())


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_a_fresh_process_computes_what_torch_does(dtype: str, converted: Any, tokenizer: Any, tmp_path: Path) -> None:
    words = {"tokenizer": tokenizer, "calibration": TEXTS, "rest": "float"}
    report = nogemm.export(converted, tmp_path / "out", dtype=dtype, **words)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
    assert report.layers == ("encoder.layer.0", "encoder.layer.1")
    assert report.cosine > 0.999
    assert json.loads((tmp_path / "out" / "nogemm_export.json").read_text())["dtype"] == dtype
    inputs = batches()
    packed = nogemm.pack(converted, dtype)
    expected = []
    for ids, mask in inputs:
        with torch.no_grad():
            expected.append(packed(input_ids=ids, attention_mask=mask).last_hidden_state)
    one, two = read(tmp_path / "out", inputs, 1), read(tmp_path / "out", inputs, 2)
    # Fixed-point projections round tokens to 15 bits: a difference in the last float bit may move a step.
    least = 1.0 if dtype == "fp32" else 0.9
    for y, z, want, (_, mask) in zip(one, two, expected, inputs, strict=True):
        assert close(y, want, mask) >= least
        assert close(z, want, mask) >= least
    assert close(one[2], expected[2].roll(1, 1), inputs[2][1]) < 0.1


def test_forced_instruction_sets_compute_the_same(converted: Any, tmp_path: Path) -> None:
    nogemm.export(converted, tmp_path / "out")
    inputs = batches()
    reference = read(tmp_path / "out", inputs)
    for isa in ("scalar", "avx2"):
        for y, want, (_, mask) in zip(read(tmp_path / "out", inputs, NOGEMM_ISA=isa), reference, inputs, strict=True):
            assert close(y, want, mask) == 1.0


def test_int8_stays_close(converted: Any, tokenizer: Any, tmp_path: Path) -> None:
    report = nogemm.export(converted, tmp_path / "out", int8=True, tokenizer=tokenizer, calibration=TEXTS)
    assert 0.9 < report.cosine < 0.99999  # it is int8, and not much worse for it
    assert "nncf" in report.versions
    graph = (tmp_path / "out" / "openvino_model.xml").read_text()
    assert 'element_type="i8"' in graph
    assert graph.count('type="PackedFFN"') == 2


@pytest.mark.parametrize(
    "config", [nogemm.TreeConfig(trees=2, depth=3), nogemm.HireConfig(keep=0.25)], ids=["tree", "hire"]
)
def test_sites_left_dense_and_other_layers_are_exported(config: Any, tmp_path: Path) -> None:
    model = build({"encoder.layer.0": config, "encoder.layer.1": nogemm.DenseConfig()})
    report = nogemm.export(model, tmp_path / "out")
    assert report.layers == ("encoder.layer.0",)
    ids, mask = batches()[1]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert close(read(tmp_path / "out", [(ids, mask)])[0], expected, mask) == 1.0


CORE = nogemm.DenseConfig(hidden=16)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("bits", [8, 4])
def test_sums_and_token_tables_are_exported(dtype: str, bits: int, tmp_path: Path) -> None:
    """Our operator answers the lookups; OpenVINO's Gather reads the rows of the graph's ids, and it adds them up."""
    table = nogemm.TokenTableConfig(bits=bits)
    model = build({"*.0": nogemm.SumConfig(terms=(CORE, LOOKUP, table)), "*.1": table})
    with torch.no_grad():
        for layer in nogemm.converted(model).values():
            for parameter in layer.table_parameters():
                parameter.normal_(std=0.3)
    report = nogemm.export(model, tmp_path / "out", dtype=dtype)
    assert report.layers == ("encoder.layer.0",)
    graph = (tmp_path / "out" / "openvino_model.xml").read_text()
    assert graph.count('type="PackedFFN"') == 1
    inputs = batches()[1:3]
    packed = nogemm.pack(model, dtype)
    with torch.no_grad():
        expected = [packed(input_ids=ids, attention_mask=mask).last_hidden_state for ids, mask in inputs]
    found = read(tmp_path / "out", inputs)
    # The narrow dense core is torch's dynamic int8 when it is packed, and float32 in the graph.
    if dtype != "int8":
        for y, want, (_, mask) in zip(found, expected, inputs, strict=True):
            assert close(y, want, mask) >= (1.0 if dtype == "fp32" else 0.9)
    assert float(torch.cosine_similarity(found[1], expected[1], dim=-1).mean()) > 0.99
    assert float(torch.cosine_similarity(found[1], expected[1].roll(1, 1), dim=-1).mean()) < 0.9


def test_token_tables_in_an_int8_graph(tokenizer: Any, tmp_path: Path) -> None:
    model = build(nogemm.SumConfig(terms=(nogemm.DenseConfig(), nogemm.TokenTableConfig())))
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, TokenTableFFN):
                part.rows.normal_(std=0.3)
    report = nogemm.export(model, tmp_path / "out", dtype="int8", int8=True, tokenizer=tokenizer, calibration=TEXTS)
    assert 0.9 < report.cosine < 0.99999


def test_the_model_is_left_as_it_was_and_a_second_export_replaces_the_first(converted: Any, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in converted.state_dict().items()}
    nogemm.export(converted, tmp_path / "out")
    (tmp_path / "out" / "stray.txt").write_text("of no export")
    nogemm.export(converted, tmp_path / "out", dtype="bf16")
    assert json.loads((tmp_path / "out" / "nogemm_export.json").read_text())["dtype"] == "bf16"
    assert not (tmp_path / "out" / "stray.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert before.keys() == converted.state_dict().keys()
    assert all(torch.equal(value, converted.state_dict()[name]) for name, value in before.items())
    assert all(isinstance(layer, nogemm.layers.FFN) for layer in installed(converted).values())


def test_a_wrong_graph_is_not_written(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is compared with the packed model: spoil what is converted, and nothing may be written."""
    from nogemm.export import openvino_host

    convert = openvino_host.convert

    def spoilt(model: Any, *others: Any) -> Any:
        graph = convert(model, *others)
        with torch.no_grad():
            model.model.get_submodule("embeddings.LayerNorm").weight.neg_()
        return graph

    monkeypatch.setattr(openvino_host, "convert", spoilt)
    with pytest.raises(nogemm.NogemmError, match="computes something else"):
        nogemm.export(converted, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_wrong_requests_are_named(converted: Any, tokenizer: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for said, options in {
        "to='tvm'": {"to": "tvm"},
        "dtype='fp8'": {"dtype": "fp8"},
        "calibration=": {"int8": True, "tokenizer": tokenizer},
    }.items():
        with pytest.raises(nogemm.ConfigError, match=said):
            nogemm.export(converted, out, **options)
    with pytest.raises(nogemm.ConfigError, match="int8=True and rest='float' contradict"):
        nogemm.export(converted, out, int8=True, rest="float")
    with pytest.raises(nogemm.ConfigError, match="rest='half'"):
        nogemm.export(converted, out, rest="half")
    with pytest.raises(nogemm.ConfigError, match="no converted FFN"):
        nogemm.export(torch.nn.Linear(2, 2), out)
    with pytest.raises(
        nogemm.ConfigError, match=r"encoder\.layer\.0 is a SwitchFFN; the host runs LookupFFN, TreeFFN, HireFFN"
    ):
        nogemm.export(build(nogemm.SwitchConfig(experts=2)), out)
    acdc = nogemm.LookupConfig(tables=8, bits=4, projection=nogemm.AcdcConfig())
    with pytest.raises(nogemm.ConfigError, match="no native kernel"):
        nogemm.export(build(acdc), out)
    with pytest.raises(nogemm.PackedError, match="training mode"):
        nogemm.export(build(LOOKUP).train(), out)
    with pytest.raises(nogemm.PackedError, match="packed"):
        nogemm.export(nogemm.pack(converted), out)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(nogemm.CheckpointError, match="no export"):
        nogemm.export(build(LOOKUP), other)
    assert not out.exists()


def test_what_is_not_installed_is_named(converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))
        with pytest.raises(nogemm.NativeError, match=r"openvino is not installed: pip install 'nogemm\[openvino\]'"):
            nogemm.export(converted, tmp_path / "out")
    monkeypatch.setenv("NOGEMM_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(nogemm.NativeError, match="CXX=no-such-compiler is not there: install g"):
            nogemm.export(converted, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(extension, "_FLAGS", (*extension._FLAGS, "-std=c++98"))
        with pytest.raises(nogemm.NativeError, match=r"could not build the OpenVINO operator: .*error"):
            nogemm.export(converted, tmp_path / "out")
    assert not list((tmp_path / "cache").rglob("*.so*"))
    assert not (tmp_path / "out").exists()


def test_the_example_in_cpp_prints_what_python_computes(converted: Any, tmp_path: Path) -> None:
    nogemm.export(converted, tmp_path / "out")
    include, libraries = extension._openvino()
    program = tmp_path / "openvino"
    command = ["-std=c++17", "-Wall", str(ROOT / "examples" / "openvino.cpp"), "-isystem", str(include)]
    folder = libraries[0].parent
    subprocess.run(
        [extension._compiler(), *command, str(libraries[0]), f"-Wl,-rpath,{folder}", "-o", str(program)], check=True
    )
    words = ["2", "17", "23", "3", "/", "11", "3"]
    said = subprocess.run(
        [str(program), str(tmp_path / "out"), *words], capture_output=True, text=True, check=True
    ).stdout
    ids, types = torch.tensor([[2, 17, 23, 3, 11, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1]])
    wanted = read(tmp_path / "out", [(ids, torch.ones_like(ids), types)])[0]
    # The program takes OpenVINO's own precision, bfloat16 where the processor has it.
    assert torch.allclose(torch.tensor([float(word) for word in said.split()]), wanted[0, :, 0], atol=0.1)
    failed = subprocess.run([str(program), str(tmp_path), "1"], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("openvino: ")


def test_the_packed_weights_are_stored_once(converted: Any, tmp_path: Path) -> None:
    report = nogemm.export(converted, tmp_path / "out")
    state = host_model(converted, "fp32", INPUTS).state_dict()
    assert report.weight_bytes < 1.1 * sum(value.numel() * value.element_size() for value in state.values())
