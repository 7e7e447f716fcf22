"""Every dense engine computes the dense layer and the dense model; none is taken for another."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nogemm.bench import peers
from nogemm.bench.contenders.layer import DenseStack
from nogemm.bench.contenders.model import DENSE_COSINES, Encoder, compare_hidden
from nogemm.bench.engine.check import DENSE_BOUNDS, compare
from nogemm.export.openvino_host import computes_bf16


@pytest.mark.parametrize("name", peers.CONTENDERS)
def test_engine_matches_the_dense_layer(name: str) -> None:
    stack = DenseStack(24, 48, "gelu", copies=2, seed=0)
    tokens = tuple(torch.randn(5, 24) for _ in range(2))
    samples = [tuple(torch.randn(32, 24) for _ in range(2)) for _ in range(4)]
    if name.startswith("inductor") and peers.missing(name) is not None:  # ./run installs all that pip can
        with pytest.raises(ModuleNotFoundError, match="install the package python3-dev"):
            peers.engine(name)
        return
    engine = peers.engine(name)
    runner = engine.compile(stack, tokens, samples)
    outputs = runner.result(runner.run(runner.prepare(tokens)))
    assert len(outputs) == 2
    reference = torch.cat(stack.double()(*(x.double() for x in tokens)))
    found = compare(torch.cat(outputs), reference, DENSE_BOUNDS[engine.precision])
    assert found["verified"] is True, found
    if engine.precision != "fp32" and (name != "openvino-bf16" or computes_bf16()):
        # It would be a fast way to win: an engine that says int8 and computes in fp32, or the other way round.
        assert found["rms_error"] > 1e-4


@pytest.mark.parametrize("name", ["torch-int8", "onnxruntime-int8", "openvino-int8"])
def test_pairs_of_products_at_their_limits_do_not_overflow(name: str) -> None:
    # Weights and activations at the ends of their ranges: two products of 8 bits exceed 16 bits.
    stack = DenseStack(64, 128, "relu", copies=1, seed=0)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.fill_(0.1 if parameter.dim() > 1 else 0.0)
    tokens = torch.ones(5, 64) - 0.1 * torch.rand(5, 64)
    engine = peers.engine(name)
    runner = engine.compile(stack, (tokens,), [(tokens,)] * 4)
    (y,) = runner.result(runner.run(runner.prepare((tokens,))))
    reference = stack.double()(tokens.double())[0]
    assert compare(y, reference, DENSE_BOUNDS[engine.precision])["verified"] is True


@pytest.mark.parametrize("name", ["torch-fp32", "torch-int8", "onnxruntime-fp32", "openvino-f32"])
def test_engine_matches_the_dense_model(name: str) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    encoder = Encoder(transformers.BertModel(config)).eval().requires_grad_(False)
    engine = peers.engine(name)
    shape = (3, 7)
    inputs = (torch.randint(5, 100, shape), torch.ones(shape, dtype=torch.long))
    runner = engine.compile(encoder, inputs, [inputs])
    (hidden,) = runner.result(runner.run(runner.prepare(inputs)))
    least = DENSE_COSINES[engine.precision]
    assert compare_hidden(hidden, encoder(*inputs)[0], least)["verified"] is True
    other = (torch.randint(5, 100, shape), inputs[1])
    assert compare_hidden(hidden, encoder(*other)[0], 0.99999)["verified"] is False


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    right = torch.randn(2, 3, 4)
    found = compare_hidden(torch.where(right == right.max(), torch.nan, right), right, 0.5)
    assert found["verified"] is False
    assert "max_error" not in found
    assert compare_hidden(right[:1], right, 0.5)["verified"] is False


def test_unknown_engines_are_named() -> None:
    with pytest.raises(ValueError, match="unknown contender 'torch-fp8'; known: torch-fp32"):
        peers.engine("torch-fp8")


def test_inductor_needs_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert peers.missing("inductor-bf16") == (
        "Python.h, which inductor compiles against, not found: install the package python3-dev"
    )
    (tmp_path / "Python.h").write_text("")
    assert peers.missing("inductor-bf16") is None


def test_absent_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("nncf", "onnx") else find(name))
    assert peers.missing("torch-fp32") is None
    assert peers.missing("openvino-f32") is None
    assert peers.missing("openvino-int8") == "nncf not installed: pip install 'nogemm[peers]'"
    with pytest.raises(ModuleNotFoundError, match="onnx not installed"):
        peers.engine("onnxruntime-fp32")


# Two graphs, the older one given up first; then a Ctrl-C. With a Core each this is a segmentation fault.
INTERRUPTED = """
import gc, os, signal
import torch
from nogemm.bench import peers
from nogemm.bench.contenders.layer import DenseStack

signal.signal(signal.SIGINT, lambda number, frame: print("handled"))

def make():
    return peers.engine("openvino-f32").compile(DenseStack(8, 16, "gelu", 1, 0), (torch.randn(2, 8),), [])

older, younger = make(), make()
del older
gc.collect()
del younger
gc.collect()
os.kill(os.getpid(), signal.SIGINT)
print("went on")
"""


def test_ctrl_c_is_survived_after_openvino() -> None:
    words = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["handled", "went", "on"], done.stderr
