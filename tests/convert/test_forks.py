"""A process that loads or packs a model may fork, and its children may call the model: gunicorn's --preload.

torch's threads do not survive a fork: a child that inherits their state waits for them for ever. What this process has
computed so far would spoil the test, so a fresh one does it, on two threads, and every case is a child of it that
loads, packs and forks once more.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel

import nogemm
from nogemm.testing.cases import KINDS

CODE = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
import torch, nogemm
from transformers import AutoModel, BertModel  # the class, too: imported here once, and not in every child

assert torch.get_num_threads() == 2
ids = torch.randint(3, 60, (4, 32))

def answers(model, seconds):
    child = os.fork()
    if child == 0:
        with torch.no_grad():
            model(ids)
        os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False

def say(path, what, answered):
    print(os.path.basename(path), what, "answers" if answered else "hangs", flush=True)

def packed(path):
    model = AutoModel.from_pretrained(path).eval()
    say(path, "loaded", answers(model, 60))
    for dtype in ("fp32", "bf16", "int8"):
        nogemm.pack(model, dtype, keep=True)
        say(path, "packed in " + dtype, answers(model, 60))
        nogemm.unpack(model)

def cast(path):
    say(path, "cast", answers(AutoModel.from_pretrained(path, dtype=torch.bfloat16).eval(), 60))

def called(path):
    model = AutoModel.from_pretrained(path).eval()
    with torch.no_grad():
        model(ids)
    say(path, "called", answers(model, 3))

def run(case, path):
    child = os.fork()
    if child == 0:
        try:
            case(path)
        finally:
            os._exit(0)
    os.waitpid(child, 0)

for path in sys.argv[2:]:
    run(packed, path)
    run(cast, path)
run(called, sys.argv[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_children_of_a_process_that_loaded_or_packed_answer(tmp_path: Path) -> None:
    dense = BertModel(
        BertConfig(
            vocab_size=62,
            hidden_size=256,  # so wide that torch shares out what it computes
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=1024,
            max_position_embeddings=32,
        ),
        add_pooling_layer=False,
    )
    dense.save_pretrained(tmp_path / "dense_model")
    for kind, config in KINDS.items():
        model = copy.deepcopy(dense)
        nogemm.convert(model, config)
        model.save_pretrained(tmp_path / kind)
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "dense_model"), *(str(tmp_path / kind) for kind in KINDS)],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(nogemm.__file__).parent.parent),
            "OMP_NUM_THREADS": "2",
            "OMP_WAIT_POLICY": "passive",
        },
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    *lines, control = done.stdout.splitlines()
    assert len(lines) == 5 * len(KINDS), done.stderr
    assert [line for line in lines if not line.endswith("answers")] == []
    # Negative control: a model that was called before the fork. (OpenMP's other implementations survive that, too.)
    if "libgomp" in Path("/proc/self/maps").read_text():
        assert control.endswith("hangs")
