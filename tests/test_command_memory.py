"""How much memory commands take at most: docs/guides/memory.md states these bounds.

A command runs on a tiny model and on a larger one. By how much its peak grows, divided by how much the weights' bytes
grow, is the factor: interpreters and libraries cancel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, LlamaForCausalLM

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fast", "slow", "table", "search", "text", "of", "a", "the"]
SIZES = {"tiny": (64, 64), "large": (512, 30_000)}  # width and vocabulary

# The most that is allowed, as a multiple of the bytes of what is read: the file's pages count as well as copies.
BOUNDS = {
    "convert": 2.5,
    "distil": 3.5,
    "pack": 1.5,
    "info": 1.0,
    "export": 8.0,
    "generate": 5.0,
}
PACK = (
    "import sys, torch, nogemm; from transformers import AutoModel\n"
    "nogemm.pack(AutoModel.from_pretrained(sys.argv[1]).eval(), dtype='int8')(torch.arange(8).view(1, 8))"
)


def status_kb(pid: int, field: str) -> int:
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:  # it has ended
        return 0
    return int(found.group(1)) if found else 0


def session_of(stat: str) -> int:
    """Read the session from a line of /proc/PID/stat, behind the name, which may hold anything."""
    return int(stat.rsplit(")", 1)[1].split()[3])


def peak_bytes(command: list[str]) -> int:
    """Run a command, and return the largest sum of the peaks of its processes that lived at one time."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    words: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment}
    running = subprocess.Popen(command, start_new_session=True, **words)
    most = 0
    while running.poll() is None:
        total = 0
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                ours = session_of((entry / "stat").read_text()) == running.pid
            except OSError:
                continue
            total += status_kb(int(entry.name), "VmHWM") if ours else 0
        most = max(most, total)
        time.sleep(0.01)
    said = running.communicate()[0]
    assert running.returncode == 0, said
    return most * 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save an encoder, a converted one and a decoder of each size, and some texts."""
    root = tmp_path_factory.mktemp("models")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(root / "vocab.txt"))
    rows = [{"text": f"{a} {b} of the {a}"} for a in WORDS[5:] for b in WORDS[5:]]
    (root / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for size, (width, vocabulary) in SIZES.items():
        torch.manual_seed(0)
        common: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 2}
        common |= {"num_hidden_layers": 4, "vocab_size": vocabulary}
        encoder, decoder = BertModel(BertConfig(**common)), LlamaForCausalLM(LlamaConfig(**common))
        for name, model in (("encoder", encoder), ("decoder", decoder)):
            model.save_pretrained(root / size / name)
            tokenizer.save_pretrained(root / size / name)
    return root


def nogemm(*words: object) -> list[str]:
    return [sys.executable, "-m", "nogemm", *map(str, words)]


def commands(root: Path, size: str) -> dict[str, tuple[list[str], list[Path]]]:
    """Return {command: (its words, what it reads)}, in the order in which they build upon each other."""
    dense, decoder = root / size / "encoder", root / size / "decoder"
    converted, trained = root / size / "converted", root / size / "trained"
    small = ["--set", "tables=32", "--set", "bits=8"] if size == "large" else ["--set", "tables=2", "--set", "bits=3"]
    some = ["--set", "batch_tokens=256", "--set", "max_length=16"]
    texts = root / "texts.jsonl"
    return {
        "convert": (nogemm("convert", dense, converted, "--method", "lookup", *small), [dense]),
        "distil": (
            nogemm("distil", converted, trained, "--teacher", dense, "--data", texts, "--tokens", 1000, *some),
            [dense, converted],
        ),
        "pack": ([sys.executable, "-c", PACK, str(trained)], [trained]),
        "info": (nogemm("info", trained), [trained]),
        "export": (nogemm("export", trained, root / size / "exported", "--rest", "float"), [trained]),
        "generate": (nogemm("generate", decoder, "--prompt", "the fast", "--max-new-tokens", 2), [decoder]),
    }


def weight_bytes(folders: list[Path]) -> int:
    return sum(file.stat().st_size for one in folders for file in one.glob("*.safetensors"))


@pytest.mark.slow
def test_no_command_takes_more_than_is_stated(folder: Path) -> None:
    peaks: dict[str, dict[str, int]] = {size: {} for size in SIZES}
    read: dict[str, dict[str, int]] = {size: {} for size in SIZES}
    for size in SIZES:
        for name, (words, inputs) in commands(folder, size).items():
            peaks[size][name] = peak_bytes(words)
            read[size][name] = weight_bytes(inputs)
    factors = {
        name: (peaks["large"][name] - peaks["tiny"][name]) / (read["large"][name] - read["tiny"][name])
        for name in BOUNDS
    }
    for name, factor in factors.items():
        print(f"{name}: {factor:.2f} of {read['large'][name] / 1e6:.0f} MB, at most {BOUNDS[name]}")
    assert {name: factor for name, factor in factors.items() if factor > BOUNDS[name]} == {}
    assert all(factor > 0.3 for factor in factors.values()), "the measure sees the model"


def test_the_bounds_are_those_of_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "guides" / "memory.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `nogemm[ .]([a-z ]+)` .*\| ([\d.]+) \|$", text, re.MULTILINE))
    assert {name: float(bound) for name, bound in stated.items()} == BOUNDS


def test_the_peak_of_a_process_and_its_children_is_seen() -> None:
    def holding(megabytes: int) -> list[str]:
        child = f"b = bytearray({megabytes} << 20); import time; time.sleep(0.5)"
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
        return [sys.executable, "-c", code]

    assert 90 << 20 < peak_bytes(holding(100)) - peak_bytes(holding(0)) < 130 << 20
    assert session_of("7 (a) b) S 1 2 345 0") == 345
