"""Compressed tables are loaded and packed without an fp32 copy of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import run_python
from transformers import BertConfig, BertModel

import nogemm

D_MODEL = 384
CONFIG = nogemm.LookupConfig(tables=64, bits=12, projection=nogemm.BHConfig(rounds=1, block=32))
FP32_BYTES = 64 * 4096 * D_MODEL * 4

LOAD_AND_PACK = """
import sys
import torch
from transformers import AutoModel
import nogemm
from nogemm.hardware.memory import peak_memory_bytes

before = peak_memory_bytes()
model = AutoModel.from_pretrained(sys.argv[1]).eval()
loaded = peak_memory_bytes()
nogemm.pack(model, dtype="int8")
model(input_ids=torch.tensor([[1, 2, 3]]))
print(loaded - before, peak_memory_bytes() - before)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save one model with a single large layer, its tables in fp32 and in int8."""
    config = BertConfig(
        vocab_size=8, hidden_size=D_MODEL, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    model = BertModel(config, add_pooling_layer=False)
    nogemm.convert(model, CONFIG)
    with torch.no_grad():  # trained, as far as packing cares
        for layer in nogemm.converted(model).values():
            layer.tables += 0.01  # type: ignore[operator]
    found = {}
    for storage in ("fp32", "int8"):
        if storage != "fp32":
            nogemm.compress(model, storage)
        found[storage] = tmp_path_factory.mktemp(storage) / "model"
        nogemm.save(model, found[storage])
    return found


def peaks(folder: Path) -> tuple[int, int]:
    """Return by how much loading, then packing, raised a fresh process's peak memory."""
    loading, packing = run_python(LOAD_AND_PACK, str(folder)).stdout.split()[-2:]
    return int(loading), int(packing)


def test_int8_tables_never_exist_in_fp32(folders: dict[str, Path]) -> None:
    loading, packing = peaks(folders["int8"])
    # The file's pages, the model's own copy and the packed one: three times a quarter.
    assert loading < 0.65 * FP32_BYTES
    assert packing < 0.9 * FP32_BYTES
    # The measure sees what it must: the same model in fp32 does hold its tables in fp32.
    assert peaks(folders["fp32"])[0] > 0.95 * FP32_BYTES
