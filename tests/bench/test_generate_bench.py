"""`nogemm bench generate` on a small decoder: rows, checks that refuse, contenders that are absent, its table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import nogemm
import people
from nogemm.bench import generate as bench
from nogemm.bench.contenders.generate import GenerateContender, Torch, behind, perplexity
from nogemm.bench.engine.measure import trial_runs
from nogemm.bench.report.tables import generate_table

TEXTS = ["a fast table", "a small tree", "fast a tree"] * 80


def args(model: Path, *against: str, **more: Any) -> bench.GenerateArgs:
    defaults: dict[str, Any] = {"prompt": 4, "new_tokens": 6, "text": 24, "threads": 1, "rounds": 1, "seconds": 0.01}
    return bench.GenerateArgs(model=str(model), against=against, **(defaults | more))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return people.gpt2(tmp_path_factory.mktemp("bench") / "gpt2")


def test_engines_are_verified_and_timed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench._PACKAGES, "torchao", ("no_such_package",))
    names = ("nogemm-openvino-int8", "openvino-int8", "torch-bf16", "torchao-int8", "llama.cpp-given")
    torch_ones = ("nogemm-deferred-fp32", "nogemm-deferred-sampled-bf16")
    names += (*torch_ones, "nogemm-high_recall-fp32", "nogemm-openvino-deferred-int8")
    monkeypatch.setitem(bench._PACKAGES, "llama.cpp", ())
    with trial_runs():
        result = bench.run_generate_bench(args(model, *names, folder=str(tmp_path / "kept")), TEXTS)
    rows = {row["contender"]: row for row in result["rows"]}
    ours, dense = rows["nogemm-openvino-int8"], rows["openvino-int8"]
    assert ours["verified"], ours
    assert dense["verified"], dense
    for name in ("torch-bf16", *torch_ones, "nogemm-high_recall-fp32", "nogemm-openvino-deferred-int8"):
        assert rows[name]["verified"], rows[name]
    assert rows["nogemm-deferred-fp32"]["proven_tokens"] == 32
    assert rows["nogemm-deferred-sampled-bf16"]["proven_tokens"] == 32
    assert rows["nogemm-high_recall-fp32"]["proven_tokens"] == 0
    assert rows["nogemm-high_recall-fp32"]["perplexity"] == pytest.approx(result["perplexity_fp32"], rel=1e-3)
    assert ours["tokens_per_second"] == pytest.approx(6e6 / ours["us_median"])
    assert ours["ratio"] == 1
    assert ours["proven_tokens"] == rows["nogemm-openvino-deferred-int8"]["proven_tokens"] == 39
    assert rows["nogemm-openvino-deferred-int8"]["bytes_read"] != ours["bytes_read"]
    assert ours["perplexity"] == pytest.approx(result["perplexity_fp32"], rel=0.3)
    assert "no_such_package not installed" in rows["torchao-int8"]["missing"]
    assert "reads GGUF files" in rows["llama.cpp-given"]["missing"]
    kept = (tmp_path / "kept" / "exact-int8" / "nogemm_export.json").stat().st_mtime_ns
    table = generate_table(result)
    assert [line[0] for line in table.rows] == list(names)
    assert all(len(line) == len(table.head) for line in table.rows)
    with trial_runs():
        bench.run_generate_bench(args(model, names[0], folder=str(tmp_path / "kept")), TEXTS)
    assert (tmp_path / "kept" / "exact-int8" / "nogemm_export.json").stat().st_mtime_ns == kept


def test_an_engine_that_computes_something_else_is_refused(model: Path) -> None:
    settings = {
        "engine": "torch",
        "model": str(model),
        "precision": "fp32",
        "prompts": [[1, 2, 3]],
        "text": [token % 9 for token in range(12)],
        "reference": None,
    }
    contender = GenerateContender(settings)
    facts = contender.prepare({"new_tokens": 3})
    assert facts["verified"]
    assert isinstance(contender.engine, Torch)
    contender.reference = facts["perplexity"] / 2
    worse = contender.prepare({"new_tokens": 3})
    assert not worse["verified"]
    assert "another model" in worse["error"]


def test_a_token_is_as_far_behind_as_its_logit() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 2.75]])
    assert behind(logits, [1, 2]) == 0.25
    assert behind(logits, [2, 1]) == 3.0


def test_perplexity_is_that_of_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(130, 9)
    ids = torch.randint(0, 9, (130,)).tolist()
    chances = logits.double().softmax(1)[torch.arange(129), torch.tensor(ids[1:])]
    assert perplexity(logits, ids) == pytest.approx(math.exp(-chances.log().mean()))
    assert perplexity(torch.zeros(130, 9), ids) == pytest.approx(9)


def test_bad_input(model: Path) -> None:
    with pytest.raises(nogemm.ConfigError, match="--against 'mlx': choose from"):
        bench.run_generate_bench(args(model, "mlx"), TEXTS)
    with pytest.raises(nogemm.ConfigError, match="the texts are too few"):
        bench.run_generate_bench(args(model, "torch-bf16"), TEXTS[:10])
    with pytest.raises(nogemm.ConfigError, match="new_tokens must be at least 2"):
        bench.run_generate_bench(args(model, "torch-bf16", new_tokens=1), TEXTS)
