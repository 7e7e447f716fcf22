"""Figures with their intervals, and ranks of a search: what training and evaluating both measure.

A rank counts ties against the model, a rank beyond ten scores zero, and a non-finite number is an error and never a low
score. Every figure here is a mean over queries or texts, so its interval comes from resampling those.

Legend: Q queries, P documents, D embedding width.
Reading order: `Figure`, the bootstrap, the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
CUT = 10
_CHUNK = 1 << 22

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Hold one measured figure with its 95 % bootstrap interval and the number of samples behind it."""

    value: float
    low: float
    high: float
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Return the figure as JSON-able numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "samples": self.samples}


def bootstrap_ratio(above: ArrayLike, below: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """Estimate sum(above) / sum(below) over paired samples, with a percentile interval.

        value = sum_i above[i] / sum_i below[i];  each resample draws the same indices i for both

    Args:
        above, below: one number per sample, equally long, finite.
        resamples: number of bootstrap resamples.
        seed: of the resampling only.
    Raises:
        ValueError: on empty, unequal or non-finite samples, or a sum of zero below.
    Cost: resamples * samples draws, in pieces of a few million.
    Example:
        >>> bootstrap_ratio([1.0, 1.0], [2.0, 2.0]).value
        0.5
    """
    top, bottom = _samples(above), _samples(below)
    if top.shape != bottom.shape:
        raise ValueError(f"paired samples differ in number: {top.size} and {bottom.size}")
    if bottom.sum() == 0:
        raise ValueError("the figure to compare with is zero, so no ratio exists")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // top.size)
    draws = []
    for start in range(0, resamples, rows):
        index = rng.integers(0, top.size, size=(min(rows, resamples - start), top.size))
        sums = bottom[index].sum(axis=1)
        # A resample may draw only zeros below: its ratio is then unbounded, which the percentile must see.
        draws.append(np.divide(top[index].sum(axis=1), sums, out=np.full(len(index), np.inf), where=sums != 0))
    low, high = np.percentile(np.concatenate(draws), [2.5, 97.5], method="nearest")
    return Figure(value=float(top.sum() / bottom.sum()), low=float(low), high=float(high), samples=int(top.size))


def bootstrap_mean(values: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """Estimate a mean with a percentile interval: `bootstrap_ratio` over ones."""
    samples = _samples(values)
    return bootstrap_ratio(samples, np.ones_like(samples), resamples=resamples, seed=seed)


def bootstrap_difference(ours: ArrayLike, theirs: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0) -> Figure:
    """Estimate mean(ours - theirs) over paired samples; an interval without zero is a difference that counts."""
    first, second = _samples(ours), _samples(theirs)
    if first.shape != second.shape:
        raise ValueError(f"paired samples differ in number: {first.size} and {second.size}")
    return bootstrap_mean(first - second, resamples=resamples, seed=seed)


def search_ranks(query_QD: ArrayLike, doc_PD: ArrayLike, right_Q: ArrayLike | None = None) -> NDArray[np.int64]:
    """Rank the right document of every query among all documents.

        rank[i] = #{ j : <q_i, p_j> >= <q_i, p_r(i)> },  so 1 is best and ties count against

    Scores are summed in float64 and rounded to float32 before they are compared: equal documents then tie
    whatever order a matrix product adds in.

    Args:
        right_Q: r, the number of each query's document; None: document i is right for query i.
    Raises:
        ValueError: if shapes disagree, fewer documents than queries are given, or any number is not finite.
    Cost: 2*Q*P*D FLOP.
    Example:
        >>> search_ranks([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]).tolist()
        [2, 2]
    """
    query, doc = checked_embeddings(query_QD, "query"), checked_embeddings(doc_PD, "document")
    if query.shape[1] != doc.shape[1]:
        raise ValueError(f"queries have width {query.shape[1]} and documents {doc.shape[1]}")
    if right_Q is None and len(doc) < len(query):
        raise ValueError(f"{len(query)} queries but only {len(doc)} documents: document i answers query i")
    place_Q = np.arange(len(query)) if right_Q is None else np.asarray(right_Q)
    ranks = np.empty(len(query), dtype=np.int64)
    rows = max(1, _CHUNK // len(doc))
    for start in range(0, len(query), rows):
        part = slice(start, min(start + rows, len(query)))
        score = (query[part] @ doc.T).astype(np.float32)
        right = score[np.arange(len(score)), place_Q[part]]
        ranks[part] = (score >= right[:, None]).sum(axis=1)
    return ranks


def reciprocal_ranks(ranks: ArrayLike, cut: int = CUT) -> Vector:
    """Turn ranks into 1 / rank, or 0 beyond `cut`; their mean is MRR@cut."""
    rank = np.asarray(ranks, dtype=np.float64)
    return np.where(rank <= cut, 1.0 / rank, 0.0)


def _samples(values: ArrayLike) -> Vector:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"expected a list of at least one number, got an array of shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} samples are not finite")
    return array


def checked_embeddings(values: ArrayLike, whose: str) -> Vector:
    """Return embeddings as float64 [N, D], or say what is wrong with them."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"expected {whose} embeddings [N, D], got an array of shape {array.shape}")
    broken = ~np.isfinite(array).all(axis=1)
    if broken.any():
        raise ValueError(f"{int(broken.sum())} of {len(array)} {whose} embeddings are not finite")
    return array
