"""The head's operators alone, in OpenVINO: torch's answers on odd shapes, any threads, any instruction set; damage."""

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
from safetensors.torch import save_file

from nogemm import ops
from nogemm.export.decoder_graph import Factory
from nogemm.export.openvino_host import shared_core
from nogemm.heads import make_codes
from nogemm.ops.packed_head import ROW_DTYPES, embed_rows, pack_head

SHAPES = [(1, 8, 4), (63, 24, 64), (307, 70, 16), (64, 33, 0)]


def head(rows: int, width: int, leading: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> Any:
    torch.manual_seed(rows)
    weight = torch.randn(rows, width).to(dtype)
    own = torch.randn(rows) if bias else None
    return weight, own, make_codes(weight, own, leading=leading)


def compiled(
    weight: torch.Tensor, packed: np.ndarray, library: Path, threads: int = 1, best: int = 0, noise: bool = False
) -> Any:
    """Compile the proof or, with `best` above 0, the search."""
    from openvino import opset15 as ov

    x = ov.parameter([-1, -1, weight.shape[1]], np.float32)
    rows = ov.constant(weight.view(torch.uint8).numpy())
    given = [x, *([ov.parameter([-1, -1], np.float32)] if noise else [])]
    inputs = [x.output(0), ov.constant(packed).output(0), rows.output(0), *(each.output(0) for each in given[1:])]
    factory = Factory(library)
    node = factory("HeadSearch", inputs, best=best) if best else factory("HeadArgmax", inputs)
    model = openvino.Model([ov.result(output) for output in node.outputs()], given, "head")  # type: ignore[misc]
    config = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return shared_core().compile_model(model, "CPU", config)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", sorted(ROW_DTYPES, key=str))
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_as_torchs(shape: tuple[int, int, int], dtype: torch.dtype, threads: int, library: Path) -> None:
    weight, bias, codes = head(*shape, dtype, bias=shape[0] != 63)
    run = compiled(weight, pack_head(weight, bias, codes).numpy(), library, threads)
    for batch, length in ((1, 1), (2, 9), (3, 7)):
        x = torch.randn(batch, length, shape[1]) * 3
        token, logit, exact = (torch.from_numpy(run([x.numpy()])[i].copy()) for i in range(3))
        expected = ops.head_argmax(x.flatten(0, 1), weight, bias, codes)
        assert torch.equal(token.flatten().long(), expected[0])
        assert torch.equal(logit.flatten(), expected[1])
        assert torch.equal(exact.flatten().long(), expected[2])
    wrong = weight.clone()
    wrong[:] = -weight.float().to(dtype)
    if shape[0] > 1:  # rows that the codes are not of give another answer: the comparison can fail
        other = compiled(wrong, pack_head(weight, bias, codes).numpy(), library, threads)
        assert not np.array_equal(other([x.numpy()])[1], logit.numpy())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("rows", "width", "leading", "best"), [(1, 8, 4, 1), (307, 70, 16, 9), (2000, 40, 8, 500)])
def test_a_search_is_torchs(rows: int, width: int, leading: int, best: int, threads: int, library: Path) -> None:
    weight, bias, _ = head(rows, width, leading, torch.float16)
    codes = make_codes(weight, bias, leading=leading, sketch=24)
    packed = pack_head(weight, bias, codes).numpy()
    run = compiled(weight, packed, library, threads, best)
    x = torch.randn(2, 9, width) * 3
    token, state = (torch.from_numpy(run([x.numpy()])[i].copy()) for i in range(2))
    expected = ops.head_search(x.flatten(0, 1), weight, bias, codes, best)
    assert torch.equal(token.flatten().long(), expected[0])
    assert torch.equal(state, x)
    if rows > 1:  # among fewer rows it finds another token: the comparison can fail
        fewer = compiled(weight, packed, library, threads, 1)([x.numpy()])[0]
        assert not np.array_equal(fewer, token.numpy())


@pytest.mark.parametrize("best", [0, 40])
def test_noise_is_added(best: int, library: Path) -> None:
    weight, bias, codes = head(307, 70, 16)
    run = compiled(weight, pack_head(weight, bias, codes).numpy(), library, best=best, noise=True)
    x, noise = torch.randn(2, 3, 70), torch.randn(6, 307) * 20
    x[1, 2] = 3e38  # bounds beyond float32: answered by all logits
    flat = x.flatten(0, 1)

    def expected(noise_NV: torch.Tensor | None) -> list[int]:
        if best:
            return ops.head_search(flat, weight, bias, codes, best, noise_NV=noise_NV)[0].tolist()
        return ops.head_argmax(flat, weight, bias, codes, noise_NV=noise_NV)[0].tolist()

    assert run([x.numpy(), noise.numpy()])[0].flatten().tolist() == expected(noise)
    assert run([x.numpy(), np.zeros((1, 1), np.float32)])[0].flatten().tolist() == expected(None)
    assert expected(noise) != expected(None)
    with pytest.raises(RuntimeError, match="best must be at least 1"):
        compiled(weight, pack_head(weight, bias, codes).numpy(), library, best=-1)


def test_states_without_a_token(library: Path) -> None:
    weight, bias, codes = head(307, 70, 16)
    run = compiled(weight, pack_head(weight, bias, codes).numpy(), library)
    x = torch.randn(1, 4, 70)
    x[0, 1, 3], x[0, 2] = torch.nan, 3e38
    found = run([x.numpy()])
    index, value, rows = ops.head_argmax(x[0], weight, bias, codes)
    assert found[0][0].tolist() == index.tolist()
    assert index[1] == -1
    np.testing.assert_array_equal(found[1][0], value.numpy())
    assert found[2][0].tolist() == rows.tolist()


@pytest.mark.parametrize("isa", ops.supported_isas())
def test_every_instruction_set(isa: str, library: Path, tmp_path: Path) -> None:
    weight, bias, codes = head(307, 70, 16, torch.float16)
    x = torch.randn(1, 5, 70)
    packed = pack_head(weight, bias, codes)
    save_file({"weight": weight, "packed": packed.clone(), "x": x}, tmp_path / "in.safetensors")
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import test_head_operator as t\n"
        "from safetensors.torch import load_file\n"
        "a = load_file(sys.argv[2]); run = t.compiled(a['weight'], a['packed'].numpy(), pathlib.Path(sys.argv[3]))\n"
        "print(run([a['x'].numpy()])[0][0].tolist())"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path / "in.safetensors"), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"NOGEMM_ISA": isa})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ops.head_argmax(x[0], weight, bias, codes)[0].tolist())


def test_damaged_codes_are_refused(library: Path) -> None:
    weight, bias, codes = head(307, 70, 16)
    whole = pack_head(weight, bias, codes).numpy()
    compiled(weight, whole, library)
    other_version, other_size = whole.copy(), whole.copy()
    other_version.view(np.int64)[1] = 99
    other_size.view(np.int64)[9] = len(whole)
    for packed, said in (
        (whole[:-64].copy(), "damaged codes"),
        (other_version, "another version"),
        (other_size, "damaged codes"),
        (np.zeros(4096, np.uint8), "not a packed head"),
    ):
        with pytest.raises(RuntimeError, match=said):
            compiled(weight, packed, library)
    with pytest.raises(RuntimeError, match=r"the codes are of rows \[307, 280\]"):
        compiled(weight[:-1], whole, library)


def test_rows_are_embedded(library: Path) -> None:
    from openvino import opset15 as ov

    for dtype, number in ROW_DTYPES.items():
        weight = head(63, 24, 8, dtype)[0]
        rows = weight.view(torch.uint8)
        ids = ov.parameter([-1, -1], np.int64)
        node = Factory(library)("EmbedRows", [ids.output(0), ov.constant(rows.numpy()).output(0)], dtype=number)
        model = openvino.Model([ov.result(node.output(0))], [ids], "embed")  # type: ignore[misc]
        run = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        asked = torch.tensor([[0, 62, 5], [7, 7, 1]])
        found = torch.from_numpy(run([asked.numpy()])[0].copy())
        assert torch.equal(found, weight[asked].float())
        assert torch.equal(found, embed_rows(asked, rows, number))
