"""The row: one contender on one case, as result files hold it and tables show it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict, cast


class Row(TypedDict, total=False):
    """What is known of one contender on one case; a field that does not apply is absent.

    The case: `batch` tokens (of a model: texts), `length` tokens of each text, `tokens` of a training step, `cache`
    ("fresh" or "warm"), `codes` ("uniform" or "trained"), `phase` of a profile. Times are microseconds a call of one
    layer, or of the model. docs/reference/results.md has the same list for readers of result files.

    Attributes:
        contender: who.
        verified: whether its answer matched the reference; without that it has no time.
        max_error, rms_error: the worst token's error and that of all, as shares of the reference's root mean square.
        us_median, us_p10, us_p90, us_per_token, calls: times, and how many calls there were.
        rounds: where there were fewer than a run has.
        ratio: its median / that of our first precision.
        published_against, published_ratio: whose time a paper divided by this one, and what comes out here.
        error, missing, skipped: instead of a time: what failed, what to install, how far it came.
        layers: copies of the layer that one call went through.
        flops, bytes_read, row_bytes, weight_bytes, token_bytes: of the call, as `cost()` counts them, and as stored.
        gflops, gb_per_s, roofline_fraction, bound, computes_in: rates, and what bounds them.
        native: of ours: False where PyTorch stood in for the kernel, None where torch's kernels are the point.
        flip_rate, other_way: shares of decisions, and of tokens, that rounding sends another way.
        recall, energy, dense_energy: of HireFFN.
        n, k, threads, pattern: of a search for the k largest of n numbers, with promised (recall), buckets, kept.
        memory_bytes, agreement, agreement_texts, trained: of a model.
        new_tokens, tokens_per_second, perplexity: of a decoder that generates.
        proven_tokens, other_tokens: held against all logits, and how many of them a tie decided otherwise.
        rows, rows_p99, positions: of a vocabulary head: computed exactly, and on how many states it was verified.
        parts: of a training step: us of forward, backward, update.
        events: hardware events a call.
    """

    contender: str
    batch: int
    length: int
    tokens: int
    cache: str
    codes: str
    phase: str
    verified: bool
    max_error: float | None
    rms_error: float
    us_median: float | None
    us_p10: float | None
    us_p90: float | None
    us_per_token: float | None
    calls: int
    rounds: int
    ratio: float | None
    published_against: str
    published_ratio: float | None
    error: str
    missing: str
    skipped: str
    layers: int
    flops: float
    bytes_read: float
    row_bytes: float
    weight_bytes: float
    token_bytes: float
    gflops: float | None
    gb_per_s: float | None
    roofline_fraction: float | None
    bound: str | None
    computes_in: str
    native: bool | None
    flip_rate: float | None
    other_way: float
    recall: float
    energy: float
    dense_energy: float
    memory_bytes: int
    agreement: float
    rows: float
    rows_p99: float
    positions: int
    new_tokens: int
    tokens_per_second: float
    perplexity: float
    proven_tokens: int
    other_tokens: int
    n: int
    k: int
    threads: int
    pattern: str
    promised: float
    buckets: int
    kept: int
    agreement_texts: int
    trained: bool
    parts: dict[str, float]
    events: dict[str, float]


def fill(row: Row, names: Iterable[str]) -> None:
    """Give a row None for those of the named fields that it lacks, so that all rows of a table have them."""
    values = cast("dict[str, Any]", row)
    for name in names:
        values.setdefault(name, None)
