"""Exported decoders: tokens of the dense model in the same engine, our loop, openvino-genai, damage, bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import decoders
import nogemm
import people
from nogemm.export import OpenVINODecoder, export_decoder
from nogemm.export import decoder_graph as dg
from nogemm.export.decoder_check import compare_tokens, dense_logits
from nogemm.export.folder import RECORD
from nogemm.export.openvino_host import load
from nogemm.layers import TokenTableFFN

NEW = 10
GENAI = importlib.util.find_spec("openvino_genai") is None


def exported(kind: str, folder: Path, body: str, rows: str, *, exact: bool = True, model: Any = None) -> Any:
    model = decoders.make(kind) if model is None else model
    if exact:
        nogemm.convert_head(model)
    return model, export_decoder(model, folder, body=body, rows=rows)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("decoder") / "llama"
    return exported("llama tied", folder, "float", "fp32")[0], folder


@pytest.mark.parametrize(
    ("kind", "body", "rows"),
    [
        ("llama", "int8", "bf16"),
        ("gemma3 sliding", "int4", "fp16"),
        ("gemma2 capped", "float", "fp32"),
        ("qwen2", "int8", "fp16"),
        ("phi with a bias", "float", "fp32"),
    ],
)
def test_tokens_are_those_of_the_dense_head_in_openvino(kind: str, body: str, rows: str, tmp_path: Path) -> None:
    model, report = exported(kind, tmp_path / "exact", body, rows)
    assert report.head == "exact"
    assert report.proven > NEW
    assert report.near_ties <= 1
    own = OpenVINODecoder(tmp_path / "exact", precision="f32")
    dense = None
    if rows != "fp32":
        assert exported(kind, tmp_path / "dense", body, rows, exact=False)[1].head == "dense"
        dense = OpenVINODecoder(tmp_path / "dense", precision="f32")
    for prompt in (decoders.prompts(1, 5), decoders.prompts(2, 11)):
        gen = nogemm.GenerationReport()
        found = own.generate(prompt, NEW, report=gen)
        assert len(gen.rows) == NEW * len(prompt)
        if dense is not None:
            assert torch.equal(found, dense.generate(prompt, NEW))
        else:
            plain = decoders.make(kind)
            assert torch.equal(found, nogemm.generate(model, prompt, NEW))
            assert torch.equal(found, plain.generate(prompt, max_new_tokens=NEW, do_sample=False))
    assert max(gen.rows) <= decoders.V


def test_token_tables_read_the_ids_of_the_new_tokens(tmp_path: Path) -> None:
    model = decoders.make("llama tied")
    plain = decoders.make("llama tied")
    nogemm.convert(model, nogemm.SumConfig(terms=(nogemm.DenseConfig(), nogemm.TokenTableConfig())))
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, TokenTableFFN):
                part.rows.normal_(std=2.0)
    report = exported("llama tied", tmp_path / "out", "float", "fp32", model=model)[1]
    assert report.layers == ()  # OpenVINO's own Gather reads the rows
    own = OpenVINODecoder(tmp_path / "out", precision="f32")
    for prompt in (decoders.prompts(1, 5), decoders.prompts(2, 11)):
        found = own.generate(prompt, NEW)
        assert torch.equal(found, nogemm.generate(model, prompt, NEW))
        assert not torch.equal(found, plain.generate(prompt, max_new_tokens=NEW, do_sample=False))


def test_padding_on_the_left_streaming_and_ends(llama: tuple[Any, Path]) -> None:
    model, folder = llama
    decoder = OpenVINODecoder(folder, precision="f32", threads=2)
    prompt = decoders.prompts(2, 6)
    mask = torch.ones_like(prompt)
    mask[0, :3] = 0
    seen: list[torch.Tensor] = []
    found = decoder.generate(prompt, NEW, attention_mask=mask, streamer=seen.append)
    assert torch.equal(found, nogemm.generate(model, prompt, NEW, attention_mask=mask))
    assert torch.equal(torch.stack(seen, 1), found[:, 6:])
    # The memory was filled under the mask: without it nothing of it may be used.
    assert torch.equal(decoder.generate(found, 3), nogemm.generate(model, found, 3))
    more = decoder.generate(prompt, NEW + 1)
    assert torch.equal(more, nogemm.generate(model, prompt, NEW + 1))
    end = int(found[1, 8])
    short = decoder.generate(prompt[1:], NEW, eos_token_id=end)
    assert short[0, -1] == end
    assert short.shape[1] <= 9
    assert torch.equal(decoder.generate(prompt, 0), prompt)


def test_an_interrupted_generation_goes_on(llama: tuple[Any, Path]) -> None:
    _, folder = llama
    decoder = OpenVINODecoder(folder, precision="f32", threads=1)
    prompt = decoders.prompts(1, 6)
    whole = decoder.generate(prompt, NEW)
    kept: list[torch.Tensor] = []

    def stop(token: torch.Tensor) -> None:
        kept.append(token)
        if len(kept) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.generate(prompt, NEW, streamer=stop)
    sizes: list[int] = []
    decoder._memory.request = _Watched(decoder._memory.request, sizes)
    so_far = torch.cat((prompt, torch.stack(kept, 1)), 1)
    assert torch.equal(decoder.generate(so_far, NEW - 4), whole)
    assert sizes == [1] * (NEW - 4)  # nothing was run twice


class _Watched:
    def __init__(self, request: Any, sizes: list[int]) -> None:
        self.request, self.sizes = request, sizes

    def infer(self, inputs: dict[str, Any], **more: Any) -> Any:
        self.sizes.append(inputs["input_ids"].shape[1])
        return self.request.infer(inputs, **more)

    def reset_state(self) -> None:
        self.request.reset_state()


def test_logits_for_samplers_are_a_peak(llama: tuple[Any, Path]) -> None:
    from nogemm.export.memory import step

    _, folder = llama
    record = json.loads((folder / RECORD).read_text())
    graph = load(folder / record["model"], folder / record["extension"])
    found = step(dg.compile_graph(graph, precision="f32").create_infer_request(), decoders.prompts(2, 4), 4)
    logits, token = found[dg.LOGITS], found[dg.TOKEN]
    assert logits.shape == (2, 1, decoders.V)
    assert np.array_equal(logits.argmax(-1), token)
    assert np.isneginf(logits).sum() == 2 * (decoders.V - 1)
    assert np.allclose(logits.max(-1), found[dg.LOGIT])


@pytest.mark.skipif(GENAI, reason="openvino-genai is not installed")
def test_genai_gives_the_same_tokens(llama: tuple[Any, Path]) -> None:
    _, folder = llama
    prompt = decoders.prompts(1, 6)
    expected = OpenVINODecoder(folder, precision="f32").generate(prompt, NEW)
    assert decoders.genai_tokens(folder, prompt, NEW) == expected[0, 6:].tolist()


def test_a_converted_ffn_stays_ours(tmp_path: Path) -> None:
    model = decoders.make("llama")
    nogemm.convert(model, nogemm.HireConfig(keep=0.9, sketch="int8"), layers=[1])
    for layer in nogemm.converted(model).values():
        layer.fitted = "distilled"
    _, report = exported("llama", tmp_path / "hire", "float", "fp32", model=model)
    assert len(report.layers) == 1
    graph = load(tmp_path / "hire" / "openvino_model.xml", tmp_path / "hire" / "libnogemm_openvino.so")
    kinds = [node.get_type_name() for node in graph.get_ops()]
    assert kinds.count("PackedFFN") == 1
    assert kinds.count("HeadArgmax") == 1
    assert report.agreement > 0.999


def test_a_wrong_token_is_found() -> None:
    torch.manual_seed(0)
    rows, states = torch.randn(50, 8), torch.randn(6, 8)
    head = dg.GraphHead(rows=rows, bias=torch.randn(50), codes=None, tied=False, scale=1.0, cap=None)
    logits = dense_logits(states, head)
    assert head.bias is not None
    assert torch.allclose(logits, states @ rows.T + head.bias, atol=1e-4)
    tokens = logits.argmax(1)
    assert compare_tokens(tokens, states, logits, rows, "test") == 0
    tokens[3] = logits[3].topk(2).indices[1]
    with pytest.raises(nogemm.NogemmError, match=r"token .* at step 3 is not the dense head's"):
        compare_tokens(tokens, states, logits, rows, "test")


def test_states_that_are_not_finite_make_no_token(tmp_path: Path, llama: tuple[Any, Path]) -> None:
    broken = decoders.make("llama")
    nogemm.convert_head(broken)
    export_decoder(broken, tmp_path / "broken", body="float", rows="fp32")
    file = tmp_path / "broken" / "openvino_model.bin"
    data = np.fromfile(file, np.uint8)
    row = broken.get_input_embeddings().weight.detach()[7].numpy().tobytes()
    place = data.tobytes().find(row)
    assert place >= 0
    data[place : place + 4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    data.tofile(file)
    with pytest.raises(nogemm.CheckpointError, match=r"openvino_model\.bin is damaged"):
        OpenVINODecoder(tmp_path / "broken")
    record = json.loads((tmp_path / "broken" / RECORD).read_text())
    (tmp_path / "broken" / RECORD).write_text(json.dumps(record | {"checksums": {}}))
    prompt = torch.tensor([[3, 4, 7]])
    with pytest.raises(nogemm.NotFiniteError, match="sequence 0 at position 2 is not finite"):
        OpenVINODecoder(tmp_path / "broken").generate(prompt, 3)


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [
        ({"to": "tvm"}, nogemm.ConfigError, "to must be one of openvino, got to='tvm'"),
        ({"body": "int2"}, nogemm.ConfigError, "body must be one of float, int8, int4"),
        ({"rows": "int8"}, nogemm.ConfigError, "rows='int8' is for a dense one"),
    ],
)
def test_bad_choices(more: dict[str, str], error: Any, said: str, tmp_path: Path) -> None:
    model = decoders.make("llama")
    nogemm.convert_head(model)
    with pytest.raises(error, match=said):
        export_decoder(model, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(nogemm.PackedError, match="training mode"):
        export_decoder(decoders.make("llama").train(), tmp_path / "out")
    encoder = people.bert(tmp_path / "bert")
    from transformers import AutoModel

    with pytest.raises(nogemm.ConfigError, match="no causal language model"):
        export_decoder(AutoModel.from_pretrained(encoder).eval(), tmp_path / "out")
    large = decoders.make("llama")
    with torch.no_grad():
        large.lm_head.weight[3, 3] = 1e6
    with pytest.raises(nogemm.ConfigError, match=r"not finite in torch\.float16; use rows='bf16'"):
        export_decoder(large, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(nogemm.CheckpointError, match="no export"):
        export_decoder(decoders.make("llama"), tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_bad_prompts(llama: tuple[Any, Path]) -> None:
    decoder = OpenVINODecoder(llama[1], threads=1)
    prompt = decoders.prompts(1, 4)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (prompt[:, :0], {}, "the prompt is empty"),
        (prompt.float(), {}, "int64"),
        (prompt + decoders.V, {}, "must be from 0 to 306"),
        (prompt, {"max_new_tokens": -1}, "max_new_tokens must be an integer"),
        (prompt, {"max_new_tokens": 99}, "more than the model's 64 positions"),
        (prompt, {"attention_mask": torch.tensor([[1, 1, 0, 1]])}, "padding on the left"),
    ]
    for ids, more, said in wrong:
        with pytest.raises(nogemm.ConfigError, match=said):
            decoder.generate(ids, **more)


def test_folders_that_are_damaged(llama: tuple[Any, Path], tmp_path: Path) -> None:
    with pytest.raises(nogemm.CheckpointError, match="no record of an export"):
        OpenVINODecoder(tmp_path)
    for name in ("openvino_model.bin", "libnogemm_openvino.so"):
        copy = tmp_path / name
        shutil.copytree(llama[1], copy)
        (copy / name).unlink()
        with pytest.raises(nogemm.CheckpointError, match=f"{name} is missing"):
            OpenVINODecoder(copy)
    for name in ("openvino_model.bin", "openvino_model.xml", "libnogemm_openvino.so"):
        copy = tmp_path / f"cut {name}"
        shutil.copytree(llama[1], copy)
        os.truncate(copy / name, (copy / name).stat().st_size // 2)
        with pytest.raises(nogemm.CheckpointError, match=f"{name} is damaged"):
            OpenVINODecoder(copy)
    flipped = tmp_path / "flipped"
    shutil.copytree(llama[1], flipped)
    weights = bytearray((flipped / "openvino_model.bin").read_bytes())
    weights[len(weights) // 2] ^= 1
    (flipped / "openvino_model.bin").write_bytes(weights)
    with pytest.raises(nogemm.CheckpointError, match=r"openvino_model\.bin is damaged"):
        OpenVINODecoder(flipped)
    with pytest.raises(nogemm.ConfigError, match="threads"):
        OpenVINODecoder(llama[1], threads=-1)
    with pytest.raises(nogemm.ConfigError, match="precision"):
        OpenVINODecoder(llama[1], precision="int3")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = people.gpt2(tmp_path / "gpt2")
    out = tmp_path / "out"
    assert people.run("export", model, out, "--generate", "--body", "float", "--json", tmp_path / "e.json") == 0
    assert "tokens equal to those of OpenVINO's own dense head" in capsys.readouterr().out
    assert json.loads((tmp_path / "e.json").read_text())["head"] == "exact"
    assert people.run("export", model, tmp_path / "no", "--generate", "--head", "some") == 2
    assert "--head must be exact or dense" in capsys.readouterr().err


def test_the_command_packs_converted_ffns_as_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = people.gpt2(tmp_path / "gpt2")
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    nogemm.convert(model, nogemm.HireConfig(keep=0.9, sketch="int8"))
    for layer in nogemm.converted(model).values():
        layer.fitted = "distilled"
    nogemm.save(model, tmp_path / "hire", tokenizer=AutoTokenizer.from_pretrained(source))
    sizes = {}
    for dtype in (None, "int8", "fp32"):
        more = () if dtype is None else ("--dtype", dtype)
        out = tmp_path / f"out-{dtype}"
        assert people.run("export", tmp_path / "hire", out, "--generate", "--body", "float", *more) == 0
        sizes[dtype] = (out / "openvino_model.bin").stat().st_size
    assert sizes[None] == sizes["int8"] != sizes["fp32"]  # of layers this small padding decides which is larger
    capsys.readouterr()
    assert people.run("export", tmp_path / "hire", tmp_path / "no", "--generate", "--dtype", "int2") == 2
    assert "int2" in capsys.readouterr().err
