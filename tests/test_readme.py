"""The README's example runs as it stands, on a tiny model; its links and its commands exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel, BertTokenizer

from nogemm.layers import FFN, PackedFFN

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "three", "words", "more", "text", "of", "a", "table"]


def example() -> str:
    """Return the one Python block of the README."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    return block


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Save a small BERT and its tokenizer."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_example_runs_as_printed(tiny, tmp_path, monkeypatch, capsys):
    # Only the model's name and the budget are others: a million tokens are half an hour of the reader's time.
    code = example().replace("sentence-transformers/all-MiniLM-L6-v2", str(tiny))
    code = code.replace("tokens=1_000_000", "tokens=300, batch_tokens=64")
    assert "tokens=300" in code
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "converted" / "model.safetensors").is_file()
    assert "torch.Size([1, 5, 64])" in capsys.readouterr().out
    layers = [module for module in names["fast"].modules() if isinstance(module, (FFN, PackedFFN))]
    assert [type(layer).__name__ for layer in layers] == ["PackedLookup"] * 2


def test_the_example_is_short():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 12


def test_the_readme_fits_a_screen_and_its_links_exist():
    assert len(README.splitlines()) <= 80
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert missing == []


def test_run_explains_itself():
    done = subprocess.run([str(ROOT / "run")], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0
    for command in ("demo", "test", "bench", "docs"):
        assert f"./run {command}" in done.stdout
    unknown = subprocess.run([str(ROOT / "run"), "dance"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2
    assert "dance" in unknown.stderr


PYTHON = """#!/bin/sh
# Stands for a Python: without its venv module, with whatever else is asked of it.
case "$*" in
  *venv*) exit 1 ;;
  "- "*) echo "packages a"; echo "native b" ;;
esac
"""


@pytest.mark.parametrize(
    ("present", "said"),
    [
        ((), "install the package python3 "),
        (("python3",), "install the package python3-venv"),
        ((".venv",), "install the package g++"),
        ((".venv", "g++"), "install the package make"),
    ],
    ids=["python", "venv", "g++", "make"],
)
def test_run_says_what_is_missing(tmp_path, present, said):
    """Without Python, its venv module, compiler or make: one line that names what to install; nothing is installed."""
    script = tmp_path / "run"
    script.write_bytes((ROOT / "run").read_bytes())
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("bash", "dirname", "cat", "flock", "head"):
        found = subprocess.run(["which", tool], capture_output=True, text=True, check=True).stdout.strip()
        (bare / tool).symlink_to(found)
    for tool in present:
        file = tmp_path / ".venv" / "bin" / "python" if tool == ".venv" else bare / tool
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(PYTHON)
        file.chmod(0o755)
    before = sorted(path for path in tmp_path.rglob("*") if path.name != ".run.lock")
    done = subprocess.run(
        ["bash", str(script), "docs"], capture_output=True, text=True, check=False, env={"PATH": str(bare)}
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert sorted(path for path in tmp_path.rglob("*") if path.name != ".run.lock") == before
