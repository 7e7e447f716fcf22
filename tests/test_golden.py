"""Files of every format that was ever written are read, with the answers that they gave; newer ones are refused.

`golden_files.py` made them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import nogemm
from golden_files import ANSWER, FORMATS, GOLDEN, answer, distil, ids
from nogemm.convert.packed_file import PackedFile
from nogemm.convert.sites import converted
from nogemm.errors import CheckpointError
from nogemm.export.folder import RECORD
from nogemm.export.running import decoder_record
from nogemm.hardware.speeds import Speeds

METHODS_OF_1 = {
    "dense",
    "hire",
    "leaf_tree",
    "linear",
    "lookup",
    "mongoose",
    "no",
    "shuffle",
    "slide",
    "sum",
    "switch",
    "token_table",
    "tree",
    "yoso",
}
KILOBYTES = 600  # of all of it


def agreement(found: Tensor, expected: Tensor, bound: float) -> float:
    """Return the share of tokens whose largest difference is below the bound, in units of the answers' own size.

    Products are torch's or the engine's: a token whose hash lies within their rounding of zero may read other rows.
    """
    assert found.shape == expected.shape
    far = (found - expected).abs().amax(-1) / expected.std()
    return float((far < bound).float().mean())


def check(found: Tensor, expected: Tensor, bound: float = 1e-3, least: float = 0.9) -> None:
    assert agreement(found, expected, bound) >= least
    assert agreement(found.roll(1, dims=1), expected, bound) < 0.5, "the comparison can fail"


def test_every_format_is_here_and_small() -> None:
    here = {path.name for path in GOLDEN.iterdir()}
    assert here == set(FORMATS)
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < KILOBYTES * 1000


def test_a_checkpoint_with_every_method() -> None:
    model = AutoModel.from_pretrained(GOLDEN / "encoder-1", add_pooling_layer=False)
    expected = load_file(GOLDEN / "encoder-1" / ANSWER)["fp32"]
    assert {layer.config.kind for layer in converted(model).values()} == METHODS_OF_1
    check(answer(model), expected)
    check(answer(nogemm.pack(model)), expected)


def test_a_checkpoint_with_a_head_and_compressed_tables() -> None:
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "decoder-1")
    expected = load_file(GOLDEN / "decoder-1" / ANSWER)["fp32"]
    assert nogemm.head_report(model).moment_bytes
    assert all(layer.storage == "int8" for layer in converted(model).values())
    check(answer(model), expected)
    nogemm.pack(model, "int8")
    found = nogemm.generate(model, ids(), 1)
    assert (found[:, -1] == expected[:, -1].argmax(-1)).all()


def run_folder(tmp_path: Path) -> tuple[Path, Any, Any]:
    shutil.copytree(GOLDEN / "run-1", tmp_path / "one")
    teacher, student = (
        AutoModel.from_pretrained(tmp_path / "one" / name, add_pooling_layer=False) for name in ("teacher", "student")
    )
    return tmp_path / "one" / "run", teacher, student


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    folder, teacher, student = run_folder(tmp_path)
    before = json.loads(next(folder.glob("step-*/state.json")).read_text())
    report = distil(student, teacher, folder, resume=True)
    expected = json.loads((GOLDEN / "run-1" / "losses.json").read_text())
    assert [stage.name for stage in report.stages] == list(expected)
    for stage in report.stages:
        assert stage.last == pytest.approx(expected[stage.name], rel=0.02)
    assert 0 < before["tokens"] < report.tokens, "it went on, and did not begin anew"


def test_a_run_of_a_newer_format_is_refused_with_advice(tmp_path: Path) -> None:
    folder, teacher, student = run_folder(tmp_path)
    (state,) = folder.glob("step-*/state.json")
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "version": 2, "parts": ["another"]}))
    with pytest.raises(CheckpointError, match="has format 2, this nogemm reads up to 1: upgrade nogemm to resume it"):
        distil(student, teacher, folder, resume=True)


def test_an_exported_encoder(tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    from nogemm.export import extension_path

    core = openvino.Core()
    core.add_extension(str(extension_path()))
    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(str(GOLDEN / "export-1" / "openvino_model.xml"), "CPU", config)
    given = {"input_ids": ids(), "attention_mask": torch.ones_like(ids()), "token_type_ids": torch.zeros_like(ids())}
    names = [each.get_any_name() for each in compiled.inputs]
    found = torch.from_numpy(compiled({name: given[name].numpy() for name in names})[0].copy())
    check(found, load_file(GOLDEN / "export-1" / ANSWER)["int8"], bound=0.02)
    assert json.loads((GOLDEN / "export-1" / RECORD).read_text())["format"] == 1


@pytest.mark.parametrize(("number", "refused"), [(None, False), (1, False), (2, True)])
def test_an_export_of_a_newer_format_is_refused_with_advice(number: int | None, refused: bool, tmp_path: Path) -> None:
    record = {"model": "a.xml", "extension": "b.so", "head": "exact", "vocabulary": 3, "positions": 4, "ends": []}
    for name in ("a.xml", "a.bin", "b.so"):
        (tmp_path / name).touch()
    (tmp_path / RECORD).write_text(json.dumps(record if number is None else {**record, "format": number}))
    if refused:
        with pytest.raises(CheckpointError, match="has format 2, this nogemm reads up to 1: upgrade nogemm"):
            decoder_record(tmp_path)
    else:
        assert decoder_record(tmp_path)["vocabulary"] == 3


def test_files_of_the_cache(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "packed-1.safetensors", tmp_path / "one")  # mine now, whoever owns the checkout
    (tmp_path / "one").chmod(0o644)
    file = PackedFile(tmp_path / "one")
    assert file.names == ["a", "b"]
    assert torch.equal(file.tensor("a"), torch.arange(12, dtype=torch.int8).view(3, 4))
    assert torch.equal(file.tensor("b"), torch.tensor([1.5, -2.0]).bfloat16())
    speeds = Speeds.from_dict(json.loads((GOLDEN / "speeds-1.json").read_text()))
    assert speeds.rows("int8", 1, 1000) == pytest.approx(speeds.call_us + 1000 * 110.0 * 1e-6)
