"""`bench model` end to end on a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nogemm.bench import peers
from nogemm.bench.model import ModelBenchArgs, parse_shape, run_model_bench
from nogemm.bench.model_job import OurModelContender
from nogemm.bench.models import PACKAGED, load_tokenizer
from nogemm.errors import ConfigError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> str:
    import transformers

    path = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(path)
    load_tokenizer(PACKAGED).save_pretrained(path)
    return str(path)


SET = ("tables=4", "bits=3", "projection.block=8")


def test_ours_the_dense_model_and_the_ceiling_share_a_table(dense: str) -> None:
    args = ModelBenchArgs(
        dense=dense,
        set=SET,
        shape=((2, 8),),
        against=("torch-fp32",),
        ceiling=("torch-fp32",),
        exported=("openvino-f32",),
        threads=1,
        rounds=2,
        seconds=0.01,
    )
    result = run_model_bench(args, _min_rounds=2)
    rows = {row["contender"]: row for row in json.loads(json.dumps(result))["rows"]}
    assert set(rows) == {
        "nogemm-fp32",
        "nogemm-fp32+inductor",
        "nogemm-fp32+openvino-f32",
        "torch-fp32",
        "no-ffn+torch-fp32",
    }
    if peers.missing("inductor-fp32") is not None:
        assert rows.pop("nogemm-fp32+inductor")["missing"] == peers.missing("inductor-fp32")
    for row in rows.values():
        assert row["verified"] is True, row
        assert row["max_error"] < 1e-3
        assert row["codes"] == "uniform"
        assert row["us_per_token"] == row["us_median"] / 16
        assert row["ratio"] == row["us_median"] / rows["nogemm-fp32"]["us_median"]
        assert row["memory_bytes"] > 1 << 20


def test_a_wrong_packed_model_is_refused(dense: str) -> None:
    settings: dict[str, Any] = {
        "dense": dense,
        "model": None,
        "method": "lookup",
        "set": SET,
        "dtype": "fp32",
        "seed": 0,
        "compiled": False,
    }
    contender = OurModelContender(settings)
    assert contender.prepare({"batch": 2, "length": 8})["verified"] is True
    with torch.no_grad():
        contender.packed.model.get_submodule("embeddings.LayerNorm").weight.mul_(-1)  # type: ignore[union-attr, operator]
    refused = contender.prepare({"batch": 2, "length": 8})
    assert refused["verified"] is False
    assert "does not match the reference" in refused["error"]


def test_shapes_are_read_or_refused() -> None:
    assert parse_shape("32x128") == (32, 128)
    for text in ("32", "0x5", "ax3", "3x", "-1x4"):
        with pytest.raises(ConfigError, match="expected TEXTSxTOKENS"):
            parse_shape(text)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--dtype"):
        run_model_bench(ModelBenchArgs(dtype="fp8"))
    with pytest.raises(ConfigError, match="--shape"):
        run_model_bench(ModelBenchArgs(shape=()))
    with pytest.raises(ValueError, match="unknown contender 'gemm'"):
        run_model_bench(ModelBenchArgs(ceiling=("gemm",)))
    with pytest.raises(ConfigError, match="--exported torch-fp32"):
        run_model_bench(ModelBenchArgs(exported=("torch-fp32",)))
