"""What people bring, through the commands: each directory either works as its own library runs it, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from transformers import AutoModel, OPTConfig, OPTForCausalLM

import nogemm
from nogemm.bench.contenders.model import DenseModelContender, pooled_cosine
from nogemm.convert.head import find_head
from nogemm.convert.save import save_like
from nogemm.errors import CheckpointError, ConfigError
from nogemm.models.embed import embed, logits
from nogemm.models.loading import load_encoder, load_model, load_tokenizer
from nogemm.models.pooling import pooling_of
from nogemm.train import sources as reader
from people import SAME, TEXTS, bert, edit, encoded, gpt2, pairs_file, run, sentence_encoder

TABLES = ("--set", "tables=4", "--set", "bits=3", "--set", "projection.block=8")
BUDGET = ("--tokens", 400, "--set", "batch_tokens=64")


def dense_modules(wide: int = 16) -> list[Any]:
    from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize

    torch.manual_seed(2)
    return [Dense(wide, 8, activation_function=torch.nn.Tanh()), LayerNorm(8), Normalize()]


# -- modules.json


def test_every_module_of_a_sentence_encoder_comes_along(tmp_path: Path) -> None:
    prompts = {"query": "search ", "document": "text "}
    source = sentence_encoder(tmp_path / "S", *dense_modules(), prompts=prompts)
    assert run("convert", source, tmp_path / "out", *SAME) == 0
    assert encoded(tmp_path / "out") == pytest.approx(encoded(source), abs=1e-5)
    stored = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    assert stored["prompts"] == prompts


def in_subfolder(source: Path) -> Path:
    """Move the transformer to 0_Transformer, as early releases of sentence-transformers wrote it."""
    inside = source / "0_Transformer"
    inside.mkdir()
    for path in list(source.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(path, inside / path.name)
    (source / "config.json").write_text('{"__version__": "0.3.8"}')
    modules = json.loads((source / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (source / "modules.json").write_text(json.dumps(modules))
    return source


def test_a_transformer_in_a_subfolder(tmp_path: Path) -> None:
    source = in_subfolder(sentence_encoder(tmp_path / "S", *dense_modules(), mode="cls"))
    expected = encoded(source)
    assert run("convert", source, tmp_path / "out", *SAME) == 0
    assert encoded(tmp_path / "out") == pytest.approx(expected, abs=1e-5)
    assert AutoModel.from_pretrained(tmp_path / "out").config.model_type == "bert"
    data = pairs_file(tmp_path)
    assert run("distil", tmp_path / "out", tmp_path / "learnt", "--teacher", source, "--data", data, *BUDGET) == 0
    assert encoded(tmp_path / "learnt").shape == expected.shape


def test_a_module_outside_of_the_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sentence_encoder(tmp_path / "S")
    modules = json.loads((source / "modules.json").read_text())
    modules[1]["path"] = "../elsewhere"
    (source / "modules.json").write_text(json.dumps(modules))
    assert run("convert", source, tmp_path / "out", *SAME) == 2
    assert "../elsewhere" in capsys.readouterr().err


# -- heads and missing weights


@pytest.mark.filterwarnings("ignore")
def test_a_head_without_weights_is_left_out(tmp_path: Path) -> None:
    teacher, data = bert(tmp_path / "S"), pairs_file(tmp_path)
    assert run("convert", teacher, tmp_path / "c", *TABLES) == 0
    found = []
    for named in ("BertModel", "BertForMaskedLM"):
        for folder in (teacher, tmp_path / "c"):
            edit(folder / "config.json", architectures=[named])
        words = ("--teacher", teacher, "--data", data, "--validation", data, "--json", tmp_path / "d.json")
        assert run("distil", tmp_path / "c", tmp_path / named, *words, *BUDGET) == 0
        found.append(json.loads((tmp_path / "d.json").read_text()))
        assert json.loads((tmp_path / named / "config.json").read_text())["architectures"] == ["BertModel"]
    assert found[1]["agreement"] == pytest.approx(found[0]["agreement"], abs=1e-5)
    assert found[1]["stages"][1]["last"]["output"] == pytest.approx(found[0]["stages"][1]["last"]["output"], abs=1e-5)


def test_a_head_without_weights_is_said(tmp_path: Path) -> None:
    source = bert(tmp_path / "S")
    edit(source / "config.json", architectures=["BertForMaskedLM"])
    with pytest.warns(UserWarning, match="names BertForMaskedLM, but the files have no weights of its head"):
        assert run("convert", source, tmp_path / "c", *SAME) == 0


@pytest.mark.parametrize("command", ["convert", "distil", "eval", "export"])
def test_missing_weights_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    whole, source = bert(tmp_path / "whole"), bert(tmp_path / "S")
    weights = load_file(source / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    words = {
        "convert": (source, tmp_path / "out", *SAME),
        "distil": (whole, tmp_path / "out", "--teacher", source),
        "eval": (whole, "--teacher", source, "--data", pairs_file(tmp_path)),
        "export": (source, tmp_path / "out"),
    }[command]
    assert run(command, *words) == 2
    said = capsys.readouterr().err
    assert "encoder.layer.1.attention.self.query.weight" in said
    assert str(source) in said


def test_a_head_with_some_weights_missing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = bert(tmp_path / "S", "BertForMaskedLM")
    weights = load_file(source / "model.safetensors")
    del weights["cls.predictions.transform.dense.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert run("convert", source, tmp_path / "out", *SAME) == 2
    assert "cls.predictions.transform.dense.weight" in capsys.readouterr().err
    assert run("eval", source, "--task", "mlm", "--data", pairs_file(tmp_path)) == 2


@pytest.mark.parametrize("make", [lambda path: bert(path, "BertForMaskedLM"), gpt2], ids=["bert", "gpt2"])
def test_tied_weights_are_not_missing(tmp_path: Path, make: Any) -> None:
    source = make(tmp_path / "S")
    named = json.loads((source / "config.json").read_text())["architectures"]
    act = "gelu" if named[0].startswith("Bert") else "gelu_new"
    assert run("convert", source, tmp_path / "out", *SAME[:-1], f"activation={act}") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == named


@pytest.mark.parametrize("named", [None, ["EncoderOfOurs"]], ids=["none", "unknown"])
def test_architectures_absent_or_unknown(tmp_path: Path, named: Any) -> None:
    source = bert(tmp_path / "S")
    edit(source / "config.json", architectures=named)
    assert run("convert", source, tmp_path / "out", *SAME) == 0


# -- long texts


def test_texts_longer_than_the_tables_of_positions(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    source = tmp_path / "S"
    bert(source)  # its tokenizer
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=20, eos_token_id=3, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(source)
    edit(source / "tokenizer_config.json", model_max_length=20)
    data = pairs_file(tmp_path, repeat=20)
    assert run("convert", source, tmp_path / "c", *TABLES, "--data", data) == 0
    words = ("--teacher", source, "--data", data)
    assert run("distil", tmp_path / "c", tmp_path / "out", *words, *BUDGET) == 0
    assert run("eval", tmp_path / "out", *words) == 0


# -- no padding token


def test_padding_changes_no_embedding(tmp_path: Path) -> None:
    model, tokenizer = load_encoder(gpt2(tmp_path / "S")), load_tokenizer(tmp_path / "S")
    one_by_one = embed(model, tokenizer, TEXTS, batch_tokens=1)
    assert embed(model, tokenizer, TEXTS, batch_tokens=1000) == pytest.approx(one_by_one, abs=1e-5)


def test_a_classifier_finds_the_last_token_before_the_padding(tmp_path: Path) -> None:
    model = load_model(gpt2(tmp_path / "S", "GPT2ForSequenceClassification"))
    tokenizer = load_tokenizer(tmp_path / "S")
    one_by_one = logits(model, tokenizer, TEXTS, batch_tokens=1)
    assert logits(model, tokenizer, TEXTS, batch_tokens=1000) == pytest.approx(one_by_one, abs=1e-5)


def test_a_tokenizer_without_padding_in_every_command(tmp_path: Path) -> None:
    source, data = gpt2(tmp_path / "S"), pairs_file(tmp_path)
    assert run("convert", source, tmp_path / "c", *TABLES, "--data", data) == 0
    words = ("--teacher", source, "--data", data)
    assert run("distil", tmp_path / "c", tmp_path / "out", *words, *BUDGET) == 0
    assert run("eval", tmp_path / "out", *words) == 0
    assert run("export", tmp_path / "out", tmp_path / "exported", "--data", data) == 0


# -- pooling


def agreement(tmp_path: Path, model: Path, teacher: Path, *words: str) -> float:
    report = tmp_path / "eval.json"
    assert run("eval", model, "--teacher", teacher, "--data", pairs_file(tmp_path), "--json", report, *words) == 0
    return json.loads(report.read_text())["ours"]["agreement"]["value"]


def test_eval_measures_the_embedding_that_the_directory_describes(tmp_path: Path) -> None:
    teacher = sentence_encoder(tmp_path / "S", *dense_modules(), mode="cls")
    with pytest.warns(UserWarning, match="random"):
        assert run("convert", teacher, tmp_path / "c", *TABLES) == 0
    rows = [json.loads(line) for line in pairs_file(tmp_path).read_text().splitlines()]
    texts = [row["short"] for row in rows] + [row["long"] for row in rows]
    expected = float(np.mean((encoded(tmp_path / "c", texts) * encoded(teacher, texts)).sum(1)))
    assert agreement(tmp_path, tmp_path / "c", teacher) == pytest.approx(expected, abs=1e-4)


def test_distil_learns_the_embedding_that_the_directory_describes(tmp_path: Path) -> None:
    teacher, data = sentence_encoder(tmp_path / "S", *dense_modules(), mode="cls"), pairs_file(tmp_path)
    with pytest.warns(UserWarning, match="random"):
        assert run("convert", teacher, tmp_path / "c", *TABLES) == 0
    words = ("--teacher", teacher, "--data", data, "--validation", data, "--json", tmp_path / "d.json")
    assert run("distil", tmp_path / "c", tmp_path / "out", *words, *BUDGET, "--set", "max_length=40") == 0
    texts = list(reader.texts(str(data)))
    expected = float(np.mean((encoded(tmp_path / "out", texts) * encoded(teacher, texts)).sum(1)))
    assert json.loads((tmp_path / "d.json").read_text())["agreement"] == pytest.approx(expected, abs=1e-4)


def test_a_sentence_transformer_pools_as_its_directory(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    folder = sentence_encoder(tmp_path / "S", *dense_modules(32), mode=("cls", "lasttoken"))
    model = SentenceTransformer(str(folder), device="cpu")
    hidden, mask = torch.randn(2, 3, 16), torch.ones(2, 3, dtype=torch.long)
    assert torch.equal(pooling_of(model)(hidden, mask), pooling_of(folder)(hidden, mask))
    assert not pooling_of(model)(hidden, mask).requires_grad


def test_bench_model_agrees_by_the_embedding(tmp_path: Path) -> None:
    teacher = sentence_encoder(tmp_path / "S", mode="cls")
    contender = DenseModelContender({"dense": str(teacher), "engine": "torch-fp32", "seed": 0})
    assert contender.pooling.modes == ("cls",)
    ids, _ = contender._inputs(3, 4)
    assert ids[:, 0].tolist() == [2, 2, 2]  # [CLS]
    hidden = torch.randn(3, 4, 16)
    other = hidden.clone()
    other[:, 1:] = 0.0
    assert pooled_cosine(hidden, other, contender.pooling) == pytest.approx(torch.ones(3, dtype=torch.float64))


# -- the local cache, and code that a directory brings


def test_a_name_in_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    snapshot = tmp_path / "hub" / "models--some--encoder" / "snapshots" / ("a" * 40)
    bert(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert run("convert", "some/encoder", tmp_path / "out", *SAME) == 0
    assert AutoModel.from_pretrained(tmp_path / "out").config.model_type == "bert"
    capsys.readouterr()
    assert run("convert", "some/other", tmp_path / "other", *SAME) == 2
    assert "`hf download some/other`" in capsys.readouterr().err


CODE = """
from transformers import BertConfig, BertModel

class OursConfig(BertConfig):
    model_type = "ours"

class OursModel(BertModel):
    config_class = OursConfig
"""


def test_code_of_a_directory_runs_only_if_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = bert(tmp_path / "S")
    (source / "modeling_ours.py").write_text(CODE)
    code = {"AutoConfig": "modeling_ours.OursConfig", "AutoModel": "modeling_ours.OursModel"}
    edit(source / "config.json", model_type="ours", architectures=["OursModel"], auto_map=code)
    assert run("convert", source, tmp_path / "out", *SAME) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert run("convert", source, tmp_path / "out", *SAME, "--trust-remote-code") == 0
    # The code comes along, so that the result is another such directory.
    assert agreement(tmp_path, tmp_path / "out", source, "--trust-remote-code") == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_is_an_ordinary_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    means = write_gguf(tmp_path / "tiny.gguf")
    model = load_model(tmp_path / "tiny.gguf", dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    down = torch.from_numpy(means["blk.0.ffn_down"].copy()).to(dtype)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, down)
    assert not torch.equal(model.model.layers[0].mlp.gate_proj.weight[:32].T, down[:, :32])
    assert "de-quantizing" not in "".join(capfd.readouterr())
    model.float().save_pretrained(tmp_path / "saved")  # transformers refuses both while a model counts as quantised
    again = load_model(tmp_path / "saved")
    assert torch.equal(again.model.layers[0].mlp.down_proj.weight, down.float())
    nogemm.convert_head(model)
    save_like(model, tmp_path / "tiny.gguf", tmp_path / "converted", None)  # as `nogemm convert` does
    assert find_head(load_model(tmp_path / "converted")) is not None


def test_a_gguf_file_that_was_cut_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    assert load_model(tmp_path / "whole.gguf") is not None
    header = len(whole) - 96 * 34 * 2 - 4 * 32 * 34 - 3 * 64 * 34 - 3 * 128  # what stands before the tensors, and pads
    cut = tmp_path / "cut.gguf"
    for kept in (30, header // 2, header - 40, (header + len(whole)) // 2, len(whole) - 4096, len(whole) - 1):
        cut.write_bytes(whole[:kept])
        said = rf"cut\.gguf: .* this GGUF file of {kept:,} bytes, which may be cut short: "
        with pytest.raises(CheckpointError, match=said):
            load_model(cut)


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    """transformers makes an empty one up for some kinds of models, which cuts every text to nothing."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "vocab_size": 50,
    }
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="there is no tokenizer; save it beside the model"):
        load_tokenizer(tmp_path)
