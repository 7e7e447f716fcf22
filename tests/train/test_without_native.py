"""The whole chain without the native extension, and its checkpoint read back with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_training import tiny_bert
from transformers import AutoModel

import nogemm

CHAIN = """
import sys
from pathlib import Path
import torch
from tiny_training import WordTokenizer, make_pair, make_texts
import nogemm
from nogemm import ops

assert not ops.native_available()
torch.set_num_threads(1)
pair, folder = make_pair(), Path(sys.argv[1])
x = torch.arange(2, 14).reshape(2, 6)
options = nogemm.DistilOptions(tokens=6_000, batch_tokens=128)
report = nogemm.distil(
    pair.model, pair.teacher, make_texts(), tokenizer=WordTokenizer(), output_dir=folder / "run", options=options
)
nogemm.save(pair.model.eval(), folder / "model")
with torch.no_grad():
    far = (make_pair().model.eval()(x).last_hidden_state - pair.teacher.eval()(x).last_hidden_state).norm()
    before = pair.model(x).last_hidden_state
    near = (before - pair.teacher(x).last_hidden_state).norm()
    torch.save(before, folder / "unpacked.pt")
    torch.save(nogemm.pack(pair.model)(x).last_hidden_state, folder / "packed.pt")
print(float(near / far), report.tokens)
"""


def test_chain_without_native_kernels(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHAIN, str(tmp_path)],
        env={**os.environ, "NOGEMM_DISABLE_NATIVE": "1", "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    share, tokens = done.stdout.split()
    assert float(share) < 0.8, "training did not bring the model nearer to its teacher"
    assert int(tokens) >= 6_000
    unpacked = torch.load(tmp_path / "unpacked.pt", weights_only=True)
    packed = torch.load(tmp_path / "packed.pt", weights_only=True)
    torch.testing.assert_close(packed, unpacked, rtol=1e-4, atol=1e-4)

    x = torch.arange(2, 14).reshape(2, 6)
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    assert len(nogemm.converted(model)) == 2
    with torch.no_grad():
        torch.testing.assert_close(model(x).last_hidden_state, unpacked, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(nogemm.pack(model)(x).last_hidden_state, unpacked, rtol=1e-4, atol=1e-4)
        # Another model is further away than that.
        assert (tiny_bert(seed=5).eval()(x).last_hidden_state - unpacked).abs().max() > 0.1
