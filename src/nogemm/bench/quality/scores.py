"""Score embeddings and logits: search, agreement, losses, each with its bootstrap interval.

The definitions are the project's own words (see docs): a rank counts ties against the model, a rank beyond ten
scores zero, a non-finite number is an error and never a low score. Every figure is a mean over queries or texts,
so its interval comes from resampling those queries or texts.

Figures, their bootstrap and the ranks are in `models/figures.py`.

Legend: Q queries, P documents, D embedding width.
Reading order: search figures, agreement, figures of losses and labels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nogemm.models.embed import embed
from nogemm.models.figures import (
    CUT,
    Figure,
    Vector,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    checked_embeddings,
    reciprocal_ranks,
    search_ranks,
)

__all__ = [
    "Figure",
    "agreement",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_ratio",
    "compare_search",
    "cosines",
    "embed",
    "old_index",
    "reciprocal_ranks",
    "search_metrics",
    "search_ranks",
]


def search_metrics(query_QD: ArrayLike, doc_PD: ArrayLike, *, seed: int = 0) -> dict[str, Figure]:
    """Measure MRR@10 and recall@10 of queries against all documents (document i is right for query i)."""
    ranks = search_ranks(query_QD, doc_PD)
    return {
        "mrr_at_10": bootstrap_mean(reciprocal_ranks(ranks), seed=seed),
        "recall_at_10": bootstrap_mean(ranks <= CUT, seed=seed),
    }


def old_index(our_query_QD: ArrayLike, teacher_doc_PD: ArrayLike, *, seed: int = 0) -> Figure:
    """Measure MRR@10 of our queries against documents embedded by the teacher ("old index, new encoder")."""
    return bootstrap_mean(reciprocal_ranks(search_ranks(our_query_QD, teacher_doc_PD)), seed=seed)


def cosines(ours_ND: ArrayLike, teacher_ND: ArrayLike) -> Vector:
    """Return the cosine between each pair of embeddings.

    Raises:
        ValueError: if shapes differ, a number is not finite, or an embedding has no direction (all zero).
    """
    ours, teacher = checked_embeddings(ours_ND, "our"), checked_embeddings(teacher_ND, "teacher's")
    if ours.shape != teacher.shape:
        raise ValueError(f"our embeddings are {ours.shape} and the teacher's {teacher.shape}")
    norm = np.linalg.norm(ours, axis=1) * np.linalg.norm(teacher, axis=1)
    if not np.all(norm > 0):
        raise ValueError(f"{int((norm == 0).sum())} embeddings are all zero and have no direction")
    return (ours * teacher).sum(axis=1) / norm


def agreement(ours_ND: ArrayLike, teacher_ND: ArrayLike, *, seed: int = 0) -> Figure:
    """Measure the mean cosine between our embedding and the teacher's over all texts given."""
    return bootstrap_mean(cosines(ours_ND, teacher_ND), seed=seed)


def compare_search(
    query_QD: ArrayLike,
    doc_PD: ArrayLike,
    teacher_query_QD: ArrayLike,
    teacher_doc_PD: ArrayLike,
    *,
    seed: int = 0,
) -> dict[str, dict[str, Figure]]:
    """Measure ours beside the teacher's on the same queries and documents.

    Returns:
        {"teacher": MRR@10 and recall@10, "ours": the same, agreement and old-index MRR@10,
         "kept": ours / teacher's, paired over queries, for the MRR@10 of the new and of the old index}.
    """
    theirs = reciprocal_ranks(search_ranks(teacher_query_QD, teacher_doc_PD))
    ours = reciprocal_ranks(search_ranks(query_QD, doc_PD))
    mixed = reciprocal_ranks(search_ranks(query_QD, teacher_doc_PD))
    both = np.concatenate([np.asarray(query_QD), np.asarray(doc_PD)])
    teacher_both = np.concatenate([np.asarray(teacher_query_QD), np.asarray(teacher_doc_PD)])
    return {
        "teacher": search_metrics(teacher_query_QD, teacher_doc_PD, seed=seed),
        "ours": search_metrics(query_QD, doc_PD, seed=seed)
        | {
            "agreement": agreement(both, teacher_both, seed=seed),
            "old_index_mrr_at_10": bootstrap_mean(mixed, seed=seed),
        },
        "kept": {
            "mrr_at_10": bootstrap_ratio(ours, theirs, seed=seed),
            "old_index_mrr_at_10": bootstrap_ratio(mixed, theirs, seed=seed),
        },
    }
