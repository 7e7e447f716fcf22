"""`bench model` end to end on a tiny encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nogemm.bench import peers
from nogemm.bench.contenders.model import DenseModelContender, OurModelContender
from nogemm.bench.engine.result import shown_name
from nogemm.bench.model import ModelBenchArgs, parse_shape, run_model_bench
from nogemm.bench.models import RANDOM, spread_layers, timed_encoder
from nogemm.errors import ConfigError
from nogemm.models.directory import PACKAGED
from nogemm.models.loading import load_encoder, load_tokenizer


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


@pytest.mark.slow
def test_ours_the_dense_model_and_the_ceiling_share_a_table(dense: str) -> None:
    args = ModelBenchArgs(
        dense=dense,
        set=SET,
        shape=((2, 8),),
        against=("torch-fp32",),
        ceiling=("torch-fp32",),
        layers=(1,),
        peer=(f"copy={dense}",),
        exported=("openvino-f32",),
        threads=1,
        rounds=2,
        seconds=0.01,
    )
    result = run_model_bench(args)
    rows = {row["contender"]: row for row in json.loads(json.dumps(result))["rows"]}
    assert set(rows) == {
        "nogemm-fp32",
        "nogemm-fp32+inductor",
        "nogemm-fp32+openvino-f32",
        "torch-fp32",
        "no-ffn+torch-fp32",
        "1-layers+torch-fp32",
        "copy+torch-fp32",
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
        assert row["agreement_texts"] == 64
    whole = [rows[name]["agreement"] for name in ("torch-fp32", "copy+torch-fp32")]
    assert all(agreement > 1 - 1e-9 for agreement in whole)  # what a tiny random model loses is little, but it is seen
    assert rows["no-ffn+torch-fp32"]["agreement"] < 1 - 1e-6
    assert rows["1-layers+torch-fp32"]["agreement"] < 1 - 1e-6
    assert {name for name, row in rows.items() if row["trained"]} == {"torch-fp32", "copy+torch-fp32"}
    assert shown_name(rows["1-layers+torch-fp32"]) == "1-layers+torch-fp32, untrained, 2 rounds only"


def test_layers_are_kept_evenly() -> None:
    for count, kept in ((1, (0,)), (3, (0, 2, 5)), (4, (0, 2, 3, 5)), (5, (0, 1, 2, 4, 5)), (6, tuple(range(6)))):
        model: Any = load_encoder(PACKAGED)
        layers = list(model.encoder.layer)
        assert spread_layers(model, count) == kept
        assert list(model.encoder.layer) == [layers[k] for k in kept]
        assert model.config.num_hidden_layers == count
    with pytest.raises(ConfigError, match="--layers 7: the dense model has 6"):
        spread_layers(load_encoder(PACKAGED), 7)


def test_published_shapes_have_random_weights_from_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for name, (config, fields) in list(RANDOM.items()):
        monkeypatch.setitem(RANDOM, name, (config, fields | small))
        state = torch.get_rng_state()
        one, same, other = (timed_encoder(name, seed).state_dict() for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(one[key], same[key]) for key in one)
        assert not all(torch.equal(one[key], other[key]) for key in one)
    args = ModelBenchArgs(
        dense="roberta-base",
        set=SET,
        shape=((1, 8),),
        against=("torch-fp32",),
        ceiling=(),
        exported=(),
        compiled=False,
    )
    with monkeypatch.context() as patch:
        patch.setattr("nogemm.bench.model.measure", lambda specs, cases, *rest, **more: rows_of(specs, cases))
        rows = run_model_bench(args)["rows"]
    assert [row["trained"] for row in rows] == [False, False]
    contender = DenseModelContender({"dense": "roberta-base", "engine": "torch-fp32", "seed": 0, "agreement_texts": 3})
    facts = contender.prepare({"batch": 2, "length": 8})
    assert facts["verified"] is True
    assert facts["agreement"] == pytest.approx(1.0)
    assert facts["agreement_texts"] == 4


def rows_of(specs: Any, cases: Any) -> list[dict[str, Any]]:
    return [{"contender": spec.name, **case, "verified": True, "us_median": 1.0} for case in cases for spec in specs]


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
    with pytest.raises(ConfigError, match="bert-base has random weights"):
        run_model_bench(ModelBenchArgs(dense="bert-base", model=str(tmp_path)))
    for wrong in ("a", "=b", "a+b=c", "no-ffn=c", "3-layers=c", "nogemm-fp32=c"):
        with pytest.raises(ConfigError, match="--peer"):
            run_model_bench(ModelBenchArgs(peer=(wrong,)))
    with pytest.raises(ConfigError, match="not a directory with a transformers model"):
        run_model_bench(ModelBenchArgs(peer=(f"a={tmp_path}",)))
    with pytest.raises(ConfigError, match="--exported torch-fp32"):
        run_model_bench(ModelBenchArgs(exported=("torch-fp32",)))
