"""Eight processes that serve one converted model, and the memory that they take together.

Memory is counted as the system shares it out: a page that n processes have mapped counts 1/n in each (PSS).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import run_python
from transformers import BertConfig, BertModel

import nogemm

WORKERS = 8
WORKER = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModel
import nogemm

def serve(path):
    model = nogemm.pack(AutoModel.from_pretrained(path).eval(), dtype="int8", cache=sys.argv[2] or None)
    with torch.no_grad():
        for _ in range(3):
            model(torch.arange(64).view(1, 64))
    return model

model = serve(sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model of MiniLM's shape, and one of next to nothing that runs the same code."""
    folder = tmp_path_factory.mktemp("workers")
    for name, width, vocabulary, tables in (("small", 16, 64, 1), ("model", 384, 30522, 64)):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=6,
            num_attention_heads=2,
        )
        model = BertModel(config)
        nogemm.convert(model, nogemm.LookupConfig(tables=tables, bits=8, projection=nogemm.BHConfig(block=16)))
        with torch.no_grad():
            for layer in nogemm.converted(model).values():
                layer.tables += 0.01  # type: ignore[operator]
        nogemm.save(model.eval(), folder / name)
    return folder


def pss(smaps: str) -> int:
    """Add up what a process holds of memory of its own and of models' files, from the text of its /proc/PID/smaps.

    Libraries are left out: their share hangs on who else runs on the machine.
    """
    total, counts = 0, False
    for line in smaps.splitlines():
        first, *rest = line.split(maxsplit=5)
        if re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", first):
            path = rest[4] if len(rest) == 5 else ""
            counts = not path.startswith("/") or path.endswith(".safetensors")
        elif counts and first == "Pss:":
            total += int(rest[0]) * 1024
    return total


def test_the_count_leaves_libraries_out() -> None:
    entry = "7f00-7f10 r--p 00000000 fe:00 42 {}\nSize: 90 kB\nPss: {} kB\n"
    text = entry.format("/usr/lib/libm.so", 1) + entry.format("/a b/packed-1.safetensors", 2)
    assert pss(text + entry.format("[heap]", 4) + entry.format("", 8)) == 14 * 1024


def memory(model: Path, cache: Path | None, workers: int) -> tuple[int, int]:
    """Return the bytes that the first of so many workers holds alone, and what all hold once they have answered."""
    command = [sys.executable, "-c", WORKER, str(model), str(cache or "")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running: list[subprocess.Popen[str]] = []
    try:
        first, held = 0, []
        for count in (1, workers - 1):  # the first by itself: it writes the file
            started = [subprocess.Popen(command, **pipes) for _ in range(count)]
            running += started
            for worker in started:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
            held = [pss(Path(f"/proc/{worker.pid}/smaps").read_text()) for worker in running]
            first = first or held[0]
        return first, sum(held)
    finally:
        for worker in running:
            worker.communicate()


@pytest.mark.slow
def test_eight_workers_take_little_more_than_one(folder: Path, tmp_path: Path) -> None:
    def of_model(cache: Path | None, workers: int) -> list[int]:
        bare = memory(folder / "small", tmp_path / "small" if cache else None, workers)
        whole = memory(folder / "model", cache, workers)
        return [more - less for more, less in zip(whole, bare, strict=True)]

    one, eight = of_model(tmp_path / "cache", WORKERS)
    alone, two = of_model(None, 2)
    for name, value in (("one", one), ("eight", eight), ("one without a cache", alone), ("two without a cache", two)):
        print(f"{name}: {value / 1e6:.1f} MB")
    (file,) = (tmp_path / "cache").iterdir()
    assert one > 0.8 * file.stat().st_size, "the measure sees the model"
    assert eight <= 1.2 * one
    assert two > 1.1 * alone, "without a cache each has packed tables of its own"


def test_unpacked_weights_do_not_stay_beside_the_file(folder: Path, tmp_path: Path) -> None:
    """The checkpoint's own pages are let go of, too: nothing of the model refers to them any more."""
    code = WORKER.replace("sys.stdin.read()", "print(open('/proc/self/maps').read())")
    for cache in (str(tmp_path / "cache"), ""):
        done = run_python(code, str(folder / "small"), cache)
        assert done.returncode == 0, done.stderr
        held = {line.rsplit("/", 1)[-1] for line in done.stdout.splitlines() if line.endswith(".safetensors")}
        assert ("model.safetensors" in held) == (not cache)
        assert any(name.startswith("packed-") for name in held) == bool(cache)
