"""Parts of a search: the exact front, additive models, the split of texts, names, the choice, a static embedding."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from tiny_tune import TEXTS, dense

import nogemm
from nogemm.bench.report.tune import tune_table
from nogemm.models.depth import layer_paths, spread_numbers
from nogemm.models.embed import embed
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.models.pooling import pooling_of
from nogemm.tune import OFFERS, static
from nogemm.tune.contender import DenseTuned, StaticTuned, parts_of_length
from nogemm.tune.evidence import QualityModel, check
from nogemm.tune.finish import choose, clear_of_rivals, on_front, verdict
from nogemm.tune.offers import DENSE
from nogemm.tune.options import tune_options
from nogemm.tune.search import Costs, fronts, joined, shortlist
from nogemm.tune.space import Candidate, Space, candidate_of, space_of
from nogemm.tune.texts import split_texts
from nogemm.tune.timing import LatencyModel, errors
from nogemm.tune.training import FALL, Run, measured_fall

DEPTH, NAMES = 4, ("a", "b")


def made_space(seed: int = 0) -> tuple[Space, Costs, QualityModel]:
    """Make a space of four layers with random costs and losses."""
    rng = random.Random(seed)
    offers: Any = {name: {} for name in NAMES}
    space = Space(torch.nn.Identity(), None, [], [(str(i),) for i in range(DEPTH)], True, offers)
    ffn = {name: [rng.uniform(1, 9) for _ in range(DEPTH)] for name in (DENSE, *NAMES)}
    costs = Costs(5.0, [rng.uniform(1, 5) for _ in range(DEPTH)], ffn, [0.1] * DEPTH)
    alone = {name: [rng.uniform(0.5, 1) for _ in range(DEPTH)] for name in NAMES}
    return space, costs, QualityModel([rng.uniform(0.3, 1) for _ in range(DEPTH)], alone, drop=0.7, ffn=1.3)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_that_of_all_candidates_one_by_one(seed: int) -> None:
    space, costs, quality = made_space(seed)
    choices = [[None, DENSE, *NAMES]] * DEPTH
    every = []
    for picks in itertools.product(*choices):
        kept = tuple(i for i, pick in enumerate(picks) if pick is not None)
        if kept:
            every.append(Candidate(kept, tuple(pick for pick in picks if pick is not None)))
    assert space.size() == 2 * len(every)
    points = sorted((costs.of(c), quality.loss(c)) for c in every)
    best: list[tuple[float, float]] = []
    for cost, loss in points:
        if not best or loss < best[-1][1] - 1e-12:
            best.append((cost, loss))
    found = joined(fronts(space, costs, quality))
    for point in found:
        assert point.cost == pytest.approx(costs.of(point.candidate))
        assert point.loss == pytest.approx(quality.loss(point.candidate))
    grid = 1e-3 * costs.of(space.whole)
    for cost, loss in best:  # each has its equal, up to the grid of costs that a way through the layers may use up
        assert any(p.cost <= cost + DEPTH * grid and p.loss <= loss + 1e-9 for p in found)


def test_a_shortlist_has_every_depth_and_tables_only_beside_fewer_layers() -> None:
    space, costs, quality = made_space()
    chosen = shortlist(space, costs, quality, 20)
    assert len(set(chosen)) == len(chosen)
    assert {len(c.kept) for c in chosen} == {1, 2, 3, 4}
    assert any(c.tables for c in chosen)
    assert not any(c.tables for c in chosen if len(c.kept) == DEPTH)
    assert space.whole not in chosen
    assert all(costs.of(c) <= 20.0 for c in shortlist(space, costs, quality, 20, most=20.0))
    assert not set(shortlist(space, costs, quality, 20, known=chosen)) & set(chosen)


def test_times_are_taken_apart_and_a_wrong_sum_is_seen() -> None:
    space, _, _ = made_space()
    truth = {"base": 100.0, DENSE: 50.0, "a": 20.0, "b": 10.0}

    def us(candidate: Candidate) -> float:
        return (
            truth["base"] + sum(truth[offer] for offer in candidate.ffns) + 3.0 * candidate.tables * len(candidate.kept)
        )

    samples = [space.whole, space.uniform("a"), space.uniform("b"), space.uniform(DENSE, (0,))]
    samples.append(Candidate((0, 1), (DENSE, DENSE), tables=True))
    model = LatencyModel()
    model.fit([(c, us(c)) for c in samples])
    mixed = Candidate((0, 2, 3), ("a", DENSE, "b"), tables=True)
    assert model.us(mixed) == pytest.approx(us(mixed), rel=1e-4)
    assert errors(model, [(mixed, us(mixed))])["worst"] < 1e-4
    assert errors(model, [(mixed, 2 * us(mixed))])["worst"] == pytest.approx(0.5, rel=1e-3)
    assert not model.knows(Candidate((0,), ("c",)))
    assert model.costs(space).of(mixed) == pytest.approx(us(mixed), rel=1e-4)


def test_what_training_makes_up_for_is_learnt() -> None:
    _, _, quality = made_space()
    wanted = QualityModel(quality.dropped, quality.alone, drop=0.1, ffn=0.4, tables=0.8)
    some = [Candidate((0, 1), ("a", DENSE)), Candidate((0, 1, 2, 3), ("b",) * 4), Candidate((3,), (DENSE,))]
    some.append(Candidate((0, 1), ("a", DENSE), tables=True))
    quality.learn([(c, wanted.loss(c)) for c in some])
    assert quality.to_dict() == pytest.approx(wanted.to_dict(), rel=1e-6)
    assert check(quality, [(some[0], 1 - wanted.loss(some[0]) - 0.2)])["worst"] == pytest.approx(0.2)
    runs = [Run(some[0], 100, 0.8, 1.0), Run(some[0], 400, 0.9, 4.0)]
    assert measured_fall(runs) == pytest.approx(0.5)
    assert measured_fall(runs[:1]) == FALL


def test_texts_are_held_out_once_and_the_same_every_time() -> None:
    found = split_texts(TEXTS * 2, validation=7, test=9)
    parts = [set(found.train), set(found.validation), set(found.test)]
    assert [len(part) for part in parts[1:]] == [7, 9]
    assert sum(map(len, parts)) == len(TEXTS)
    assert set.union(*parts) == set(TEXTS)
    assert split_texts(TEXTS[::-1], validation=7, test=9).test == found.test
    assert split_texts(TEXTS[1:], validation=7, test=9).sha256 != found.sha256
    sample = split_texts("sample", validation=5, test=5, most=500)
    assert not set(sample.train) & {*sample.validation, *sample.test}


def test_candidates_are_built_with_the_layers_and_tables_that_they_name(tmp_path: Path) -> None:
    path = dense(tmp_path / "dense")
    teacher, tokenizer = load_encoder(path), load_tokenizer(path)
    space = space_of(teacher, tokenizer, TEXTS[:20], OFFERS)
    assert space.layers == [(path,) for path in layer_paths(teacher)]
    candidate = Candidate((0, 2), ("narrow-4", DENSE), tables=True)
    assert candidate_of(candidate.to_dict()) == candidate
    model: Any = space.build(candidate)
    assert model.config.num_hidden_layers == 2
    layers = list(nogemm.converted(model).values())
    kinds = [[term.kind for term in layer.config.terms] for layer in layers]  # type: ignore[attr-defined]
    assert kinds == [["dense", "token_table"]] * 2
    assert [layer.config.terms[0].hidden for layer in layers] == [8, None]  # type: ignore[attr-defined]
    assert not space.plain(candidate)
    assert space.plain(space.uniform("none"))
    assert len(nogemm.sites(teacher)) == 3  # the dense model is as it was
    for name in OFFERS:
        space.build(space.uniform(name))


def rows(*figures: tuple[str, str, float, float]) -> list[dict[str, Any]]:
    return [
        {"name": name, "kind": kind, "us_median": us, "validation": value, "engine": "torch-fp32", "bytes": 10**6,
         "agreement": {"value": value, "low": value - 0.01, "high": value + 0.01}, "candidate": None, "tokens": 0}
        for name, kind, us, value in figures
    ]  # fmt: skip


def test_the_budget_chooses_and_intervals_say_what_is_clear() -> None:
    some = rows(
        ("dense", "dense", 5000.0, 1.0), ("ours", "candidate", 2000.0, 0.95), ("fewer", "rival", 1900.0, 0.90),
        ("near", "rival", 1800.0, 0.9485), ("static", "static", 10.0, 0.5),
    )  # fmt: skip
    assert choose(some, tune_options(latency_ms=2.5))[0]["name"] == "near"  # as good but for 0.002, and faster
    assert choose(some[:3], tune_options(latency_ms=2.5)) == (some[1], True)
    assert choose(some, tune_options(quality=0.97)) == (some[0], True)
    assert choose(some[1:], tune_options(quality=0.97)) == (some[1], False)
    assert choose(some, tune_options(latency_ms=0.1))[1] is False  # the static embedding is no model to write
    assert on_front(some) == ["static", "near", "ours", "dense"]
    assert clear_of_rivals(some) == []  # "near" is within the interval
    assert clear_of_rivals([some[0], some[1], some[2], some[4]]) == ["ours"]
    assert "Staying dense is the answer" in verdict(some, some[0], True, tune_options(quality=0.97))
    assert "Nothing meets --quality 0.97: the nearest is ours" in verdict(
        some[1:], some[1], False, tune_options(quality=0.97)
    )


def test_a_partial_result_and_rows_without_a_time_are_shown() -> None:
    some = rows(("dense", "dense", 5000.0, 1.0))
    some.append({"name": "static embedding", "engine": "", "us_median": None, "agreement": None, "bytes": None,
                 "tokens": 0, "missing": "pip install 'nogemm[tune]'"})  # fmt: skip
    result = {"rows": some, "front": ["dense"], "chosen": "dense", "shape": [1, 8]}
    result |= {"budget": {"name": "quality", "value": 0.9}, "checks": {"latency": {}, "final": {"worst": None}}}
    table = tune_table(result)
    assert table.rows[1][2] == "pip install 'nogemm[tune]'"
    assert table.rows[0][-1] == "chosen"


def test_a_static_embedding_folds_its_map_into_its_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x_ND, map_DE = rng.normal(size=(500, 6)), rng.normal(size=(6, 4))
    found, bias = static.ridge(x_ND, x_ND @ map_DE + 3.0)
    np.testing.assert_allclose(x_ND @ found + bias, x_ND @ map_DE + 3.0, atol=0.1)


def test_model2vec_makes_rows_that_the_contender_runs(tmp_path: Path) -> None:
    if static.missing() is not None:
        pytest.skip(str(static.missing()))
    path = dense(tmp_path / "dense")
    teacher, tokenizer = load_encoder(path), load_tokenizer(path)
    made = static.make_static(teacher, tokenizer, TEXTS, pooling_of(path), tmp_path / "static")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    files = {name: made[name] for name in ("rows", "tokenizer")}
    contender = StaticTuned({"texts": tmp_path / "texts.json", **files})
    assert contender.prepare({"batch": 2, "length": 4})["verified"]
    theirs = embed(teacher, tokenizer, TEXTS)
    ours = contender._embeddings(TEXTS)
    others = np.random.default_rng(0).permutation(len(TEXTS))
    assert 1 - (ours * theirs).sum(1).mean() < 0.7 * (1 - (ours * theirs[others]).sum(1).mean())


def test_without_model2vec_the_row_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static.importlib.util, "find_spec", lambda name: None)
    assert static.missing() == "model2vec, skeletoken not installed: pip install 'nogemm[tune]'"


def test_contenders_score_what_they_run(tmp_path: Path) -> None:
    path = dense(tmp_path / "dense")
    teacher, tokenizer = load_encoder(path), load_tokenizer(path)
    parts = {"validation": TEXTS[:6], "test": TEXTS[6:12]}
    (tmp_path / "score.json").write_text(json.dumps(parts))
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    theirs = {name: embed(teacher, tokenizer, some) for name, some in parts.items()}
    (tmp_path / "teacher.safetensors").write_bytes(save(theirs))
    settings = {
        "dense": str(path), "seed": 0, "agreement_texts": 0, "engine": "torch-fp32", "texts": tmp_path / "texts.json",
        "score": tmp_path / "score.json", "teacher": tmp_path / "teacher.safetensors",
        "cosines": tmp_path / "cosines.safetensors",
    }  # fmt: skip
    facts = DenseTuned(settings).prepare({"batch": 1, "length": 8})
    assert facts["verified"]
    assert facts["validation"] == pytest.approx(1.0, abs=1e-5)
    static_files = {"rows": tmp_path / "rows.safetensors", "tokenizer": str(path / "tokenizer.json")}
    encoder: Any = teacher
    table = encoder.get_input_embeddings().weight.detach().numpy()
    static_files["rows"].write_bytes(save({"rows": table, "bias": np.zeros(table.shape[1], np.float32)}))  # type: ignore[attr-defined]
    own = StaticTuned(settings | static_files).prepare({"batch": 2, "length": 8})
    assert own["verified"]
    assert own["validation"] < facts["validation"] - 1e-3
    assert parts_of_length([3, 5, 3, 3], 2) == [[0, 2], [3], [1]]
    assert spread_numbers(6, 3) == (0, 2, 5)
