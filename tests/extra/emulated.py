"""Run packed layers and an exported model on an emulated processor.

    python tests/extra/emulated.py valgrind --tool=none --quiet

Nothing but the processor is another: the same Python, torch and OpenVINO find AVX2 and nothing above it. MiniLM with
LookupFFNs fitted in closed form is exported in int8 here; its embeddings there are compared with torch's from here, and
must come as close as this machine's own OpenVINO does.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import nogemm
from nogemm.bench.models import sample_texts, timed_encoder, timed_tokenizer
from nogemm.models.directory import model_directory

CONFIG = nogemm.LookupConfig(tables=32, bits=6, projection=nogemm.BHConfig(block=32))
TEXTS = 12
LOSS = 0.002  # of the mean cosine, against this machine's own; 8-bit sums that saturate cost more
TESTS = (
    ["tests/layers/test_packed.py", "-k", "avx2 and fp32_matches and not minilm"],
    ["tests/layers/test_hire_packed.py", "-k", "avx2 and threads"],
    ["tests/layers/test_tree_packed.py", "-k", "avx2 and threads"],
)
# What is read is plain OpenVINO, as in the README of every exported directory; mean pooling as MiniLM's.
READER = """
import sys, numpy, openvino
folder = sys.argv[1]
core = openvino.Core()
core.add_extension(folder + "/libnogemm_openvino.so")
model = core.compile_model(folder + "/openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
given = numpy.load(folder + "/../texts.npz")
found = []
for i in range(int(given["count"])):
    ids = given[f"ids{i}"]
    names = {name for port in model.inputs for name in port.names}
    rest = {"attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}
    hidden = model({"input_ids": ids, **{name: rest[name] for name in rest if name in names}})[0]
    mean = hidden[0].mean(0)
    found.append(mean / numpy.linalg.norm(mean))
numpy.save(sys.argv[2], numpy.stack(found))
print(*sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")))
"""


def main(emulator: list[str]) -> int:
    """Run all; 1 if something differs."""
    found = run([*emulator, sys.executable, "-c", "from nogemm import ops; print(*ops.supported_isas())"])
    if found.split() != ["scalar", "avx2"]:
        print(f"avx2: the emulated processor offers {found.strip()}, not scalar and avx2", file=sys.stderr)
        return 1
    for words in TESTS:
        print(run([*emulator, sys.executable, "-m", "pytest", "-q", *words]).strip().splitlines()[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        expected = prepare(Path(folder))
        here, _ = cosine(Path(folder), [], expected)
        there, least = cosine(Path(folder), emulator, expected)
    print(f"avx2: exported int8 MiniLM, mean cosine with torch {there:.4f} (least {least:.4f}), here {here:.4f}")
    return 0 if there > here - LOSS else 1


def prepare(folder: Path) -> np.ndarray:
    """Export into `folder`, write the texts' tokens, and return torch's embeddings of them."""
    source = model_directory("all-MiniLM-L6-v2")
    model, tokenizer = timed_encoder(source), timed_tokenizer(source)
    texts = sample_texts(200)
    nogemm.convert(model, CONFIG, data=texts, tokenizer=tokenizer)
    nogemm.export(model, folder / "model", dtype="int8", int8=True, tokenizer=tokenizer, calibration=texts)
    batches = [tokenizer(text, truncation=True, max_length=128, return_tensors="pt") for text in texts[-TEXTS:]]
    arrays = {f"ids{i}": batch["input_ids"].numpy() for i, batch in enumerate(batches)}
    np.savez(folder / "texts.npz", count=np.array(len(batches)), allow_pickle=False, **arrays)
    nogemm.pack(model, "int8")
    with torch.no_grad():
        rows = [F.normalize(model(**batch).last_hidden_state[0].mean(0), dim=0) for batch in batches]
    return torch.stack(rows).numpy()


def cosine(folder: Path, emulator: list[str], expected: np.ndarray) -> tuple[float, float]:
    """Embed the texts by the exported directory: the mean and the least cosine with what is expected."""
    answers = folder / "answers.npy"
    run([*emulator, sys.executable, "-c", READER, str(folder / "model"), str(answers)])
    each = (np.load(answers) * expected).sum(1)
    return float(each.mean()), float(each.min())


def run(words: list[str]) -> str:
    """Run a command and return what it printed; its errors end this one."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words[:6])}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
