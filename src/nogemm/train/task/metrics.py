"""What a run is measured by: figures of labels, of numbers and of searches, and the interval of each.

A figure that is not defined counts as zero: the correlation of constant answers, Matthews' coefficient of one class.

Legend: N rows, C classes, D width of an embedding.
Reading order: `measured`, `figures`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nogemm.models.figures import CUT, RESAMPLES, bootstrap_mean, reciprocal_ranks, search_ranks

WILSON = "Wilson's score interval"
BOOTSTRAP = f"percentile bootstrap, {RESAMPLES:,} resamples of the rows"
Numbers = NDArray[Any]
Metric = Callable[[Numbers, Numbers], float]


def measured(task: str, answers: Numbers, targets: Numbers, spread: float = 1.0) -> dict[str, float]:
    """Return the loss and every metric of a task.

    Args:
        answers: logits [N, C] of classes, numbers [N], or ranks [N] of each query's document.
        targets: classes or numbers [N]; of "embed" they do not count.
        spread: of the numbers that were trained on, their variance, which the loss is divided by.
    """
    if task == "embed":
        return {"mrr_at_10": float(reciprocal_ranks(answers).mean()), "recall_at_10": float((answers <= CUT).mean())}
    if task == "regress":
        loss = float(np.square(answers - targets).mean() / spread)
    else:
        loss = float(_cross_entropies(answers, targets).mean())
        answers = answers.argmax(axis=1)
    return {"validation_loss": loss} | {name: metric(answers, targets) for name, metric in _metrics(task).items()}


def figures(task: str, answers: Numbers, targets: Numbers, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return every metric of a task with its 95 % interval: {"value", "low", "high", "samples", "interval"}.

    Accuracy has Wilson's interval, which also holds where all or none are right; the others are resampled by rows.
    """
    if task == "embed":
        found = {"mrr_at_10": reciprocal_ranks(answers), "recall_at_10": (answers <= CUT).astype(np.float64)}
        return {
            name: bootstrap_mean(values, seed=seed).to_dict() | {"interval": BOOTSTRAP}
            for name, values in found.items()
        }
    if task != "regress":
        answers = answers.argmax(axis=1)
    out: dict[str, dict[str, Any]] = {}
    for name, metric in _metrics(task).items():
        if name == "accuracy":
            low, high = wilson(int((answers == targets).sum()), len(targets))
        else:
            low, high = resampled(metric, answers, targets, seed)
        out[name] = {
            "value": metric(answers, targets), "low": low, "high": high, "samples": len(targets),
            "interval": WILSON if name == "accuracy" else BOOTSTRAP,
        }  # fmt: skip
    return out


def document_ranks(queries_ND: Numbers, documents_ND: Numbers, right_N: Numbers) -> NDArray[np.int64]:
    """Rank each query's document among all different ones by cosine; `right_N` is the number of its text.

    Documents of equal text count once, so that none of them stands in its own way.
    """
    _, first, place_N = np.unique(right_N, return_index=True, return_inverse=True)
    return search_ranks(_unit(queries_ND), _unit(documents_ND)[first], place_N)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(right, count).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def resampled(metric: Metric, answers: Numbers, targets: Numbers, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of a metric over resamples of the rows."""
    source = np.random.default_rng(seed)
    draws = [source.integers(0, len(targets), len(targets)) for _ in range(RESAMPLES)]
    low, high = np.percentile([metric(answers[draw], targets[draw]) for draw in draws], [2.5, 97.5], method="nearest")
    return float(low), float(high)


def _metrics(task: str) -> dict[str, Metric]:
    if task == "regress":
        return {"pearson": _pearson, "spearman": _spearman}
    return {"accuracy": _accuracy, "macro_f1": _macro_f1, "matthews": _matthews}


def _accuracy(answers: Numbers, targets: Numbers) -> float:
    return float((answers == targets).mean())


def _macro_f1(answers: Numbers, targets: Numbers) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(targets, answers, average="macro", zero_division=0))  # type: ignore[arg-type]


def _matthews(answers: Numbers, targets: Numbers) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one class alone: the coefficient is zero then
        return float(matthews_corrcoef(targets, answers))


def _pearson(answers: Numbers, targets: Numbers) -> float:
    if np.ptp(answers) == 0 or np.ptp(targets) == 0:
        return 0.0
    found = float(np.corrcoef(answers, targets)[0, 1])
    return found if math.isfinite(found) else 0.0


def _spearman(answers: Numbers, targets: Numbers) -> float:
    from scipy.stats import rankdata

    return _pearson(rankdata(answers), rankdata(targets))


def _cross_entropies(logits_NC: Numbers, targets_N: Numbers) -> Numbers:
    """Return -log softmax(logits)[class] of every row."""
    logits_NC = logits_NC.astype(np.float64)
    top_N = logits_NC.max(axis=1, keepdims=True)
    sums_N = np.log(np.exp(logits_NC - top_N).sum(axis=1)) + top_N[:, 0]
    return sums_N - logits_NC[np.arange(len(logits_NC)), targets_N]


def _unit(rows_ND: Numbers) -> Numbers:
    rows_ND = rows_ND.astype(np.float64)
    return rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
