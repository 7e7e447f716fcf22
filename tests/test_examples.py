"""The examples run from a shell on a tiny model and do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, BertTokenizer

import people

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "green", "blue", "apple", "boat", "car", "a"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small BERT and a file of texts."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config).save_pretrained(folder / "dense")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "dense")
    (folder / "texts.txt").write_text("\n".join(f"a {a} {b}" for a in WORDS[5:8] for b in WORDS[8:11]))
    return folder


def run(example: str, *words: object, launcher: Sequence[str] = ()) -> str:
    """Run an example as its user would; return what it printed."""
    command = [sys.executable, *launcher, str(ROOT / "examples" / example), *map(str, words)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_convert_distil_and_search(tiny: Path):
    said = run("convert_and_distil.py", tiny / "dense", tiny / "texts.txt", tiny / "converted", "--tokens", 500)
    assert "encoder.layer.2" in said
    assert "saved to" in said
    found = run("search_old_index.py", tiny / "dense", tiny / "converted", tiny / "texts.txt", "a red boat", "a car")
    lines = found.splitlines()
    assert lines[0] == "a red boat"
    assert len(lines) == 2 * (1 + 3)
    scores = [float(line.split()[0]) for line in lines[1:4]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow  # two servers to start; what they do is tested in tests/serve
def test_two_replicas_lose_no_answer_when_one_stops(tiny: Path):
    said = run("serve_replicas.py", tiny / "dense", "--port", 0).splitlines()
    assert said[1:] == ["80 of 80 embeddings, one replica stopped meanwhile", "1 of 1 by the other one"]


def test_a_small_model_is_trained(tmp_path: Path):
    said = run("train.py", "--steps", 2, "--save", tmp_path / "model")
    assert [line.split()[0] for line in said.splitlines()] == ["dense", "lookup", "saved"]
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_a_small_classifier_is_fine_tuned(tmp_path: Path):
    said = run("finetune.py", "--steps", 2, "--save", tmp_path / "model").splitlines()
    assert [line.split()[:2] for line in said[:6]] == [
        [name, metric] for name in ("dense", "lookup") for metric in ("accuracy", "macro_f1", "matthews")
    ]
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_a_study_is_run_row_by_row(tmp_path: Path):
    said = run("study.py", tmp_path, "--steps", 2, "--only", "no-ffn")
    assert "no FFN: validation loss" in said
    assert "2 runs done, 4 left" in said


def test_a_text_is_continued_as_the_dense_model_would(tmp_path: Path):
    model = people.gpt2(tmp_path / "gpt2")
    said = run("generate.py", model, "a fast table", "--tokens", 12)
    assert said.startswith("a fast table")
    assert said.count("same text: True") == 2
    assert "\ndeferred: " in said


def test_a_relu_decoder_computes_what_fires(tmp_path: Path):
    model = people.relu_decoder(tmp_path / "opt")
    said = run("decoder_ffn.py", model, "a fast table", "--tokens", 6, "--keep", 0.5)
    assert "model.decoder.layers.1" in said
    assert "a fast table" in said
    assert "of 6 new tokens are the dense model's" in said
    assert "hire" in run("decoder_ffn.py", model, "a fast table", "--tokens", 2, "--all")


def test_a_model_is_searched_under_a_budget(tmp_path: Path):
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(words) for words in permutations(people.WORDS[:5], 3)))
    out = tmp_path / "out"
    said = run("tune.py", people.bert(tmp_path / "dense"), tmp_path / "texts.txt", out, "--latency", 60_000, "--quick")
    assert "Staying dense is the answer to --latency 60000" in said
    assert (out / "config.json").is_file()


@pytest.mark.parametrize(
    ("mode", "sent"), [("exact", "16 bytes a token, all logits would be 20"), ("deferred", "32 bytes a token")]
)
def test_ranks_share_a_head(tmp_path: Path, mode: str, sent: str):
    model = people.gpt2(tmp_path / "gpt2")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = run("distributed.py", model, "a fast table", "--tokens", 12, "--mode", mode, launcher=torchrun)
    assert "2 ranks over shared memory, (5, 4) rows" in said
    assert sent in said
    assert "same text: True" in said
    assert "4 tokens by lists: recall 0.857 is expected" in said


def test_sparse_layers_are_named(tmp_path: Path):
    model = people.gpt2(tmp_path / "gpt2")
    (tmp_path / "texts.txt").write_text("\n".join(people.TEXTS * 2))
    said = run("sparsity.py", model, tmp_path / "texts.txt", "--tokens", 30, "--keep", "0.1,1")
    assert "transformer.h.1.mlp: " in said
    values = [float(line.rpartition(": ")[2]) for line in said.splitlines() if line.startswith("perplexity")]
    assert len(values) == 3
    assert values[0] == values[2]  # all neurons, and a share of one


def test_the_largest_numbers_are_torchs():
    said = run("topk.py", "--n", 20_000, "--k", 40, "--rows", 3)
    assert "same values: True" in said
    assert "recall: 0.9" in said or "recall: 1.0" in said
    assert "groups" in said


def test_every_example_is_short_and_described():
    described = (ROOT / "examples" / "README.md").read_text()
    files = sorted((ROOT / "examples").glob("*.py"))
    assert len(files) >= 4
    for file in files:
        assert file.name in described
        assert len(file.read_text().splitlines()) < 80


def test_an_exported_decoder_continues_a_text(tmp_path: Path):
    model = people.gpt2(tmp_path / "gpt2")
    said = run("export_decoder.py", model, tmp_path / "out", "a fast table", "--tokens", 12, "--body", "float")
    assert "13 tokens equal to the dense head's" in said
    assert "\na fast table" in said
    assert "and one token more" in said
