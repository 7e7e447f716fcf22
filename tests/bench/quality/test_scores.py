"""The words of quality, pinned by examples worked by hand; and scores that must be bad when embeddings are."""

import numpy as np
import pytest

from nogemm.bench.quality import scores
from nogemm.models import figures

RNG = np.random.default_rng(0)


def unit(rows: int, width: int = 16) -> np.ndarray:
    x = RNG.standard_normal((rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


QUERY = unit(300)
DOC = QUERY + 0.15 * unit(300)


def test_rank_counts_every_document_at_least_as_good() -> None:
    query = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    doc = np.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    # Query 0: scores 1, 0.6, 1: its own and a tie. Query 1: 0, 0.8, 0: alone. Query 2 as query 0.
    assert scores.search_ranks(query, doc).tolist() == [2, 1, 2]
    found = scores.search_metrics(query, doc)
    assert found["mrr_at_10"].value == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert found["recall_at_10"].value == 1.0


def test_ranks_beyond_ten_score_nothing() -> None:
    assert scores.reciprocal_ranks([1, 2, 10, 11, 500]).tolist() == [1.0, 0.5, 0.1, 0.0, 0.0]


def test_equal_documents_tie_wherever_they_stand() -> None:
    doc = np.repeat(unit(1, 384), 777, axis=0)
    assert set(scores.search_ranks(unit(50, 384), doc)) == {777}


def test_ranks_do_not_depend_on_the_piece_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scores.search_ranks(QUERY, DOC)
    monkeypatch.setattr(figures, "_CHUNK", 1000)
    assert (scores.search_ranks(QUERY, DOC) == whole).all()


def test_agreement_is_the_mean_cosine() -> None:
    ours, teacher = np.array([[2.0, 0.0], [0.0, 3.0]]), np.array([[1.0, 0.0], [4.0, 3.0]])
    assert scores.agreement(ours, teacher).value == pytest.approx((1 + 0.6) / 2)


def test_good_embeddings_score_high() -> None:
    assert scores.search_metrics(QUERY, DOC)["mrr_at_10"].value > 0.9


def test_constant_embeddings_score_zero() -> None:
    constant = np.ones_like(QUERY)
    found = scores.search_metrics(constant, constant)
    assert found["mrr_at_10"].value == 0
    assert found["recall_at_10"].value == 0


def test_shuffled_embeddings_score_at_the_bottom() -> None:
    shuffled = RNG.permutation(DOC)
    found = scores.search_metrics(QUERY, shuffled)
    assert found["mrr_at_10"].value < 0.05
    assert found["recall_at_10"].value < 0.1
    assert scores.old_index(QUERY, shuffled).value < 0.05
    assert abs(scores.agreement(shuffled, DOC).value) < 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_embeddings_are_an_error(bad: float) -> None:
    broken = QUERY.copy()
    broken[7, 3] = bad
    with pytest.raises(ValueError, match="1 of 300 query embeddings are not finite"):
        scores.search_metrics(broken, DOC)
    with pytest.raises(ValueError, match="1 of 300 document embeddings"):
        scores.old_index(QUERY, broken)
    with pytest.raises(ValueError, match="not finite"):
        scores.agreement(broken, QUERY)


def test_an_embedding_without_direction_is_an_error() -> None:
    with pytest.raises(ValueError, match="no direction"):
        scores.agreement(np.zeros_like(QUERY), QUERY)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="width 16 and documents 8"):
        scores.search_ranks(QUERY, DOC[:, :8])
    with pytest.raises(ValueError, match="300 queries but only 100 documents"):
        scores.search_ranks(QUERY, DOC[:100])
    with pytest.raises(ValueError, match="paired samples differ"):
        scores.bootstrap_ratio([1.0, 2.0], [1.0])


def test_interval_covers_the_mean_about_95_times_in_100() -> None:
    covered = 0
    for seed in range(400):
        sample = np.random.default_rng(seed).exponential(size=120)
        figure = scores.bootstrap_mean(sample, seed=seed)
        covered += figure.low <= 1.0 <= figure.high
    # A skewed distribution and 120 samples: a few points below 95 % are expected, ten are not.
    assert 0.90 <= covered / 400 <= 0.98


def test_interval_shrinks_with_more_samples() -> None:
    small = scores.bootstrap_mean(RNG.standard_normal(100))
    large = scores.bootstrap_mean(RNG.standard_normal(10_000))
    assert (large.high - large.low) < 0.2 * (small.high - small.low)


def test_paired_ratio_is_tighter_than_its_parts() -> None:
    theirs = RNG.random(500)
    kept = scores.bootstrap_ratio(0.97 * theirs, theirs)
    assert kept.value == pytest.approx(0.97)
    assert kept.high - kept.low < 1e-9


def test_ratio_against_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="is zero"):
        scores.bootstrap_ratio([1.0, 2.0], [0.0, 0.0])


def test_same_seed_same_interval_whatever_the_piece_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG.random(200)
    whole = scores.bootstrap_mean(values, seed=3)
    monkeypatch.setattr(figures, "_CHUNK", 1000)
    assert scores.bootstrap_mean(values, seed=3) == whole
    assert scores.bootstrap_mean(values, seed=4) != whole


def test_compare_search_keeps_the_parts_apart() -> None:
    ours_query, ours_doc = unit(300), unit(300)
    found = scores.compare_search(ours_query, ours_doc, QUERY, DOC)
    assert found["teacher"]["mrr_at_10"].value > 0.9
    assert found["ours"]["mrr_at_10"].value < 0.1
    assert found["ours"]["old_index_mrr_at_10"].value < 0.1
    assert found["kept"]["mrr_at_10"].value == pytest.approx(
        found["ours"]["mrr_at_10"].value / found["teacher"]["mrr_at_10"].value
    )
    assert found["ours"]["agreement"].samples == 600
