"""Figure 1's harness: nothing and everything are found where they must be, chances follow the angles, costs add up."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer

from nogemm.bench.report.tables import lsh_table
from nogemm.errors import ConfigError
from nogemm.layers.dense.layer import DenseFFN
from nogemm.layers.hashed.layer import hash_extended
from nogemm_papers.lsh import LshBenchArgs, learn_hashes, run_lsh_bench
from nogemm_papers.lsh_cases import Case, gaussian_case
from nogemm_papers.lsh_search import bucket_sizes, chance_of_collision, found_by_hashes, found_by_ranking


@pytest.fixture
def case() -> Case:
    """A layer whose strongest neurons are no accident: tokens lie near some neuron's direction."""
    weight = torch.randn(96, 24)
    dense = DenseFFN.from_weights(weight, 0.1 * torch.randn(96), torch.randn(24, 96), None)
    weight[:, :4] /= 4  # what tokens have most of says least about them: hashes can learn that
    tokens = weight[torch.randint(96, (600,))] + torch.randn(600, 24) * torch.tensor([6.0] * 4 + [1.0] * 20)
    return Case("near", dense, tokens[:200], tokens[200:])


def top_of(case: Case) -> torch.Tensor:
    return case.strongest(8)


def test_one_bucket_finds_all_and_disjoint_buckets_nothing(case: Case) -> None:
    tokens, neurons = torch.zeros(200, 2, dtype=torch.int32), torch.zeros(96, 2, dtype=torch.int32)
    once, twice = found_by_hashes(tokens, neurons, top_of(case), (1, 8), (1, 2))
    assert once.found == {1: 1.0, 8: 1.0} == twice.found
    assert once.computed == once.computed_p95 == 1.0
    assert (once.entries, twice.entries) == (96.0, 192.0)  # the second table repeats what the first has found
    (nothing,) = found_by_hashes(tokens, neurons + 1, top_of(case), (1, 8), (2,))
    assert nothing.found == {1: 0.0, 8: 0.0}
    assert nothing.computed == nothing.entries == 0.0


def test_rankings_from_perfect_to_reversed(case: Case) -> None:
    scores = torch.nn.functional.linear(case.x_ND, case.weight_FD, case.bias_F)
    top = top_of(case)
    exact, everything = found_by_ranking(scores, top, (1, 8), (8, 96))
    assert exact.found == {1: 1.0, 8: 1.0} == everything.found
    assert exact.computed == pytest.approx(8 / 96)
    (worst,) = found_by_ranking(-scores, top, (1, 8), (88,))
    assert worst.found == {1: 0.0, 8: 0.0}
    (chance,) = found_by_ranking(torch.rand(200, 96), top, (8,), (24,))
    assert chance.found[8] == pytest.approx(24 / 96, abs=0.05)


@pytest.mark.parametrize("degrees", [20, 60, 90, 150])
def test_random_planes_separate_as_often_as_the_angle_says(degrees: int) -> None:
    angle, bits, tables = math.radians(degrees), 3, 4
    weight = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]])
    x = torch.tensor([[1.0, 0.0, 0.0]])
    hits = 0.0
    for _ in range(40):  # 40 draws of 100 hashes, each T tables of K bits, all for one pair
        planes = torch.randn(4, 100 * tables * bits)
        planes[-1] = 0.0  # no bias: the angle is the pair's own
        code, other = (hash_extended(v, torch.zeros(1), planes, bits).view(100, tables) for v in (x, weight))
        hits += float((code == other).any(1).float().mean()) / 40
    extended = chance_of_collision(1e6 * x, 1e6 * weight, torch.zeros(1))  # the 1 of [x; 1] no longer matters
    assert float(extended) == pytest.approx(1 - degrees / 180, abs=1e-5)
    expected, other_bits = (1 - (1 - float(extended) ** k) ** tables for k in (bits, bits + 1))
    deviation = math.sqrt(expected * (1 - expected) / 4000)
    assert hits == pytest.approx(expected, abs=5 * deviation)
    assert hits != pytest.approx(other_bits, abs=5 * deviation)  # the test can tell 3 bits from 4


def test_bucket_sizes_know_even_from_skewed() -> None:
    even = torch.arange(64).remainder(8).unsqueeze(1).int()
    flat = bucket_sizes(even, even, 3)
    assert flat["sizes"] == [8.0] * 8
    assert flat["own"] == pytest.approx(8 / (1 + 63 / 8))
    assert (flat["hit"], flat["empty"], flat["tables"]) == (1.0, 0.0, 1)
    heap = bucket_sizes(even, torch.zeros_like(even), 3)
    assert heap["sizes"] == [64.0] + [0.0] * 7
    assert heap["own"] == pytest.approx(64 / (1 + 63 / 8))
    assert (heap["hit"], heap["empty"]) == (1.0, 7 / 8)


def test_learned_hashes_find_more_than_they_start_with(case: Case) -> None:
    found = []
    for steps in (0, 60):
        torch.manual_seed(0)
        layer = learn_hashes(case, 6, 2, LshBenchArgs(steps=steps, rate=0.2, batch=64))
        codes = layer.hashed(case.x_ND), layer.neuron_codes()
        assert torch.equal(layer.neuron_codes(), layer.hash_neurons())
        (search,) = found_by_hashes(*codes, top_of(case), (1,), (2,))
        found.append(search.found[1] - search.computed)
    assert found[1] > found[0] + 0.05


@pytest.fixture
def model(tmp_path: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "the", "is", "of", "and"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    BertModel(config).save_pretrained(tmp_path / "model")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


SMALL = LshBenchArgs(
    site=0,
    bits=(2, 4),
    tables=(2, 1, 8),
    learned_tables=(2,),
    top=(1, 8),
    tokens=100,
    training_tokens=300,
    draws=2,
    steps=3,
)


def test_a_run_has_every_search_with_its_cost(model: Path) -> None:
    lines: list[str] = []
    result = run_lsh_bench(replace(SMALL, model=str(model), site=1), note=lines.append)
    real, gaussian = result["cases"]
    assert gaussian["case"] == "Gaussian"
    assert "encoder.layer.1" in real["case"]
    for part in (real, gaussian):
        assert (part["d"], part["hidden"], part["tokens"]) == (32, 64, 100)
        assert part["degrees"]["1"] < part["degrees"]["8"] < part["degrees"]["all"]
        assert part["dense"] == {"flops": 2 * 32 * 64, "bytes": 4 * 32 * 64}
        rows = {name: [row for row in part["rows"] if row["method"] == name] for name in ("random", "learned", "int4")}
        assert [(row["bits"], row["tables"]) for row in rows["random"]] == [
            (bits, tables) for bits in (2, 4) for tables in (1, 2, 8)
        ]
        for row in rows["random"]:
            assert row["computed"] == pytest.approx(row["expected_computed"], abs=0.12)
            assert set(row["found"]) == set(row["expected_found"]) == {"1", "8"}
        hashing = 33 * row["bits"] * row["tables"]
        assert row["flops"] == pytest.approx(2 * hashing + 2 * 32 * 64 * row["computed"])
        assert row["bytes"] > 4 * hashing + 4 * 32 * 64 * row["computed"]
        assert [(row["bits"], row["tables"]) for row in rows["learned"]] == [(2, 2), (4, 2)]
        for row in rows["int4"]:
            assert row["computed"] == pytest.approx(row["candidates"] / 64)
            assert row["flops"] == 2 * 32 * 64 + 2 * 32 * row["candidates"]
            assert row["bytes"] == 32 * 64 / 2 + 4 * 64 + 4 * 32 * row["candidates"]
        assert {(b["method"], b["bits"]) for b in part["buckets"]} == {
            (method, bits) for method in ("random", "learned") for bits in (2, 4)
        }
    table = lsh_table(result)
    assert len(table.rows) == len(real["rows"]) + len(gaussian["rows"]) + 2
    assert {len(row) for row in table.rows} == {len(table.head)}
    assert any("low rank 8 sketch" in row[0] for row in table.rows)
    assert lines


def test_an_int4_sketch_is_not_an_int8_one(case: Case) -> None:
    from nogemm_papers.lsh import search_by_sketches

    rows = list(search_by_sketches(gaussian_case(case, 0), replace(SMALL, share=(0.1,))))
    found = {row["method"]: row["found"]["8"] for row in rows}
    assert found["int8"] > found["int4"] > found["low_rank"]


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"bits": ()}, "--bits"),
        ({"bits": (17,)}, "--bits"),
        ({"tables": (0,)}, "--tables"),
        ({"learned_tables": (-1,)}, "--learned-tables"),
        ({"top": (1, 65)}, "--top"),
        ({"share": (1.5,)}, "--share"),
        ({"tokens": 0}, "--tokens"),
        ({"draws": 0}, "--draws"),
        ({"steps": -1}, "--steps"),
        ({"rate": 0.0}, "--rate"),
        ({"site": 2}, "--site"),
    ],
)
def test_bad_values_are_named(model: Path, change: dict[str, object], flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        run_lsh_bench(replace(SMALL, model=str(model), **change))  # type: ignore[arg-type]
