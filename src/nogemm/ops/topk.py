"""The k largest numbers of each row: exact, approximate with a stated recall, by groups, or above a threshold.

All rank alike: the largest first, of equal numbers (0 and -0 are equal) the lowest index first, NaN above infinity.

Legend: n numbers a row, k winners, G groups, M numbers that reach a threshold.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nogemm.errors import ConfigError, DtypeError, ShapeError
from nogemm.ops._arguments import real, tensor, whole
from nogemm.ops._library import define
from nogemm.ops.topk_recall import expected_recall

METHODS = ("exact", "approximate")
SCORES = ("sum", "max")

# Of the native approximate kernel: buckets come in multiples of a strip, and keep at most so many numbers.
_STRIP, _MOST_KEPT = 64, 4
# What a number costs that is read into a bucket, by how many the bucket keeps, and one that was kept; of the exact form
# a number and a winner. From times of the AVX-512 kernels; they choose among plans that reach the recall, nothing else.
_READ, _RANKED = (1.0, 1.5, 2.0, 2.6), 4.0
_EXACT, _WINNER = 1.2, 50.0
_RECALL = 0.99  # of the approximate form, unless it is given

_NATIVE = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_NATIVE, torch.float64)


class TopK(NamedTuple):
    """Winners of each row: their values, and their indices, int64."""

    values: Tensor
    indices: Tensor


class Reaching(NamedTuple):
    """What reaches a threshold: values [M], indices int64 [M], and where each row's begin, int64 [rows + 1]."""

    values: Tensor
    indices: Tensor
    starts: Tensor


def topk_reference(x: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """Sort stably and cut; see `topk`."""
    index = x.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    if not sorted:
        index = index.sort(dim=-1).values
    return x.gather(-1, index), index.contiguous()


def topk_approximate_reference(x: Tensor, k: int, buckets: int, kept: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """Keep the largest of each bucket, then the largest of those; see `topk`.

    Number i is in bucket i mod `buckets`. A row that holds NaN, or whose buckets keep fewer than k numbers above
    -infinity, is answered exactly.
    """
    n = x.shape[-1]
    table = F.pad(x, (0, -n % buckets), value=-torch.inf).unflatten(-1, (-1, buckets))
    row = table.sort(dim=-2, descending=True, stable=True).indices[..., :kept, :]
    index = (row * buckets + torch.arange(buckets, device=x.device)).flatten(-2)
    found = torch.zeros(*x.shape[:-1], table.shape[-2] * buckets, dtype=torch.bool, device=x.device)
    found = found.scatter(-1, index, True)[..., :n] & (x > -torch.inf)
    exact = x.isnan().any(-1, keepdim=True) | (found.sum(-1, keepdim=True) < k)
    _, best = topk_reference(x.masked_fill(~(found | exact), -torch.inf), k, sorted)
    return x.gather(-1, best), best


def topk(
    x: Tensor, k: int, *, dim: int = -1, method: str = "exact", recall: float | None = None, sorted: bool = True
) -> TopK:
    """Find the k largest numbers of each row, and where they stand.

        values[r, j] = x[r, indices[r, j]],   x[r, indices[r, 0]] >= x[r, indices[r, 1]] >= ...

    Of equal numbers the lowest index comes first, and 0 equals -0. NaN counts as larger than infinity, as in
    `torch.topk`, and all NaN are equal. So the answer is the one of a stable sort: it does not depend on threads or
    instruction set.

    Args:
        x: [..., n, ...], float32, bfloat16, float16 or float64. The first three have a native kernel on CPUs; float64,
            and other devices, are answered by the PyTorch reference, a stable sort.
        k: from 0 to n.
        dim: the rows' dimension.
        method: "exact"; or "approximate": the row's numbers are dealt out to buckets in turn, each keeps its largest
            few, and the k largest of those are the answer. What is missing is replaced by the next best.
        recall: of "approximate": share of the true winners that is expected to be found when they stand at random
            places; more than 0, at most 1. Buckets are chosen for it (`approximate_plan`). Winners that stand at a
            common distance from each other may share a bucket; then fewer are found. None: 0.99.
        sorted: largest first; else in order of their indices, which is cheaper for large k.
    Returns:
        values [..., k, ...] of x's dtype, whose gradients go to x at the indices, and indices int64 of that shape.
    Raises:
        ConfigError: x is no tensor; k is no whole number from 0 to n; an unknown method; recall is not in (0, 1],
            or is given to the exact one.
        ShapeError: x has no dimension, or not this one. DtypeError: x is of another dtype than float64, float32,
            bfloat16 or float16.
    Cost: reads x once, and about k numbers a second time. A row whose winners stand close together costs up to n reads
        more. Rows of 65,536 and more are cut over the threads when there are fewer rows than threads.
    Source: the approximate form is "A Faster Generalized Two-Stage Approximate Top-K" (2025, arXiv 2506.04165); the
        exact one, its floor from maxima of buckets and a second look, is ours.

    Example:
        >>> topk(torch.tensor([1.0, 3.0, 3.0, 2.0]), 3)
        TopK(values=tensor([3., 3., 2.]), indices=tensor([1, 2, 3]))
    """
    x = _rows_last(x, dim, "topk")
    n, k = x.shape[-1], whole(k, "k", "topk")
    if not 0 <= k <= n:
        raise _wrong_count(k, n, f"the numbers along dim {dim}", "topk")
    if method == "exact":
        plan = None
        if recall is not None:
            raise ConfigError(f'topk: recall={recall!r} is of method="approximate"; the exact one finds all')
    elif method == "approximate":
        plan = approximate_plan(n, k, _RECALL if recall is None else recall)
    else:
        raise ConfigError(f"topk: method must be one of {', '.join(METHODS)}, got method={method!r}")
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    source = x.detach() if needs_grad else x
    if plan is not None:
        call = _TOPK_APPROXIMATE if _dispatched(x) else topk_approximate_reference
        values, indices = call(source, k, *plan, sorted)
    else:
        call = _TOPK if _dispatched(x) else topk_reference
        values, indices = call(source, k, sorted)
    if needs_grad:
        values = x.gather(-1, indices)
    if dim not in (-1, x.dim() - 1):
        return TopK(values.movedim(-1, dim), indices.movedim(-1, dim))
    return TopK(values, indices)


@torch.compiler.assume_constant_result
def approximate_plan(n: int, k: int, recall: float) -> tuple[int, int] | None:
    """Choose buckets, and how many numbers each keeps, for `topk(method="approximate")`.

    Args:
        n, k: numbers and winners of a row.
        recall: `expected_recall` that is reached, more than 0 and at most 1.
    Returns:
        (buckets, kept), the cheapest that reaches the recall; None where nothing is cheaper than being exact.
    Raises:
        ConfigError: recall is not in (0, 1].
    Example:
        >>> approximate_plan(50_257, 50, 0.99)
        (2368, 1)
    """
    n, k = whole(n, "n", "topk"), whole(k, "k", "topk")
    if not 0 < real(recall, "recall", "topk") <= 1:
        raise ConfigError(f"topk: recall must be more than 0 and at most 1, got recall={recall}")
    return _cheapest_plan(n, k, recall)


@lru_cache(maxsize=1024)
def _cheapest_plan(n: int, k: int, recall: float) -> tuple[int, int] | None:
    best: tuple[float, int, int] = (_EXACT * n + _WINNER * k, 0, 0)
    for kept in range(1, _MOST_KEPT + 1):
        most = n // (2 * kept * _STRIP)  # strips: half of the numbers at most are kept
        if k == 0 or recall == 1 or most == 0 or expected_recall(n, k, most * _STRIP, kept) < recall:
            continue
        least = -(-k // (kept * _STRIP))
        while least < most:
            middle = (least + most) // 2
            if expected_recall(n, k, middle * _STRIP, kept) >= recall:
                most = middle
            else:
                least = middle + 1
        cost = _READ[kept - 1] * n + _RANKED * most * _STRIP * kept
        best = min(best, (cost, most * _STRIP, kept))
    return best[1:] if best[1] else None


def group_scores(x: Tensor, group: int, score: str = "sum") -> Tensor:
    """Reduce groups of consecutive numbers, in float32 (float64 of float64); the last group may be shorter.

    Returns:
        [..., G], G = ceil(n / group): sums, added in order, or maxima; a NaN makes its group NaN.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    members = F.pad(wide, (0, -x.shape[-1] % group), value=0.0 if score == "sum" else -torch.inf)
    members = members.unflatten(-1, (-1, group))
    if score == "max":
        return members.amax(-1)
    total, *rest = members.unbind(-1)
    for column in rest:
        total = total + column
    return total


def topk_grouped_reference(x: Tensor, k: int, group: int, sum: bool, sorted: bool) -> tuple[Tensor, Tensor]:
    """Reduce, then rank; see `topk_grouped`."""
    return topk_reference(group_scores(x, group, "sum" if sum else "max"), k, sorted)


def topk_grouped(x: Tensor, k: int, *, group: int, score: str = "sum", dim: int = -1, sorted: bool = True) -> TopK:
    """Find the k groups of consecutive numbers with the largest sums, or the largest maxima.

        score[r, g] = sum_{g group <= i < (g + 1) group} x[r, i],  or the maximum of the same numbers

    A group of neurons is one block of memory, so a layer that keeps whole groups reads longer pieces (HiRE's
    group-sparse FFN, with the activations' sizes as x).

    Args:
        x: [..., n, ...] of a floating dtype, as in `topk`.
        k: groups, from 0 to G = ceil(n / group); the last group may be shorter.
        group: numbers a group, at least 1.
        score: "sum", in order and in float32, or "max".
        dim, sorted: as in `topk`; ties and NaN too. A group with a NaN, or with both infinities when summed, is NaN.
    Returns:
        scores [..., k, ...], float32 (float64 of float64), and the groups' numbers, int64.
    Raises:
        ConfigError: k is no whole number from 0 to G, group none of at least 1, an unknown score. Else as `topk`.
    Cost: n additions or comparisons, then `topk` of G numbers.
    Gradient: to the members of the chosen groups; of a maximum, to the members that equal it, in equal shares.
    Source: HiRE (2024), group-sparse FFN.
    Example:
        >>> topk_grouped(torch.tensor([1.0, 2.0, 9.0, -9.0, 3.0]), 2, group=2)
        TopK(values=tensor([3., 3.]), indices=tensor([0, 2]))
    """
    x = _rows_last(x, dim, "topk_grouped")
    k, group = whole(k, "k", "topk_grouped"), whole(group, "group", "topk_grouped")
    if group < 1:
        raise ConfigError(f"topk_grouped: group must be at least 1, got group={group}")
    if score not in SCORES:
        raise ConfigError(f"topk_grouped: score must be one of {', '.join(SCORES)}, got score={score!r}")
    groups = -(-x.shape[-1] // group)
    if not 0 <= k <= groups:
        raise _wrong_count(k, groups, f"the groups of {group} along dim {dim}", "topk_grouped")
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    call = _TOPK_GROUPED if _dispatched(x) else topk_grouped_reference
    values, indices = call(x.detach() if needs_grad else x, k, group, score == "sum", sorted)
    if needs_grad:
        values = group_scores(x, group, score).gather(-1, indices)
    if dim not in (-1, x.dim() - 1):
        return TopK(values.movedim(-1, dim), indices.movedim(-1, dim))
    return TopK(values, indices)


def topk_threshold_reference(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare everything; see `topk_threshold`."""
    limit = threshold.to(x.dtype if x.dtype == torch.float64 else torch.float32).reshape(*x.shape[:-1], 1)
    wide = x.to(limit.dtype)
    reaching = torch.where(limit.isnan(), wide.isnan(), ~(wide < limit))
    counts = reaching.sum(-1).flatten()
    return x[reaching], reaching.nonzero()[:, -1], F.pad(counts.cumsum(0), (1, 0))


def topk_threshold(x: Tensor, threshold: float | Tensor) -> Reaching:
    """Find the numbers of each row that reach a threshold, however many they are.

        row r: the i with x[r, i] >= threshold[r],  increasing, at starts[r] .. starts[r + 1] of values and indices

    NaN reaches every threshold, and a threshold of NaN is reached by NaN alone, as `topk` ranks them.

    Args:
        x: [..., n] of a floating dtype, as in `topk`; rows are counted in order of memory, the leading dims flattened.
        threshold: a number, or one for each row, [...]; compared in float32 (float64 of float64).
    Returns:
        values [M] of x's dtype, indices int64 [M] within their rows, starts int64 [rows + 1].
    Raises:
        ConfigError: x is no tensor, or threshold neither a number nor a tensor.
        ShapeError: x has no dimension, or threshold is a tensor of another shape than x's without its last.
        DtypeError: x is of another dtype than float64, float32, bfloat16 or float16, or threshold is complex.
    Cost: reads x twice: once to count.
    Example:
        >>> topk_threshold(torch.tensor([[1.0, 3.0], [5.0, 4.0]]), 3.0)
        Reaching(values=tensor([3., 5., 4.]), indices=tensor([1, 0, 1]), starts=tensor([0, 1, 3]))
    """
    x = _rows_last(x, -1, "topk_threshold")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if isinstance(threshold, Tensor) and threshold.is_complex():
        raise DtypeError(f"topk_threshold: threshold must be real, got {threshold.dtype}")
    if isinstance(threshold, Tensor) and threshold.dim() > 0:
        if threshold.shape != x.shape[:-1]:
            raise ShapeError(
                f"topk_threshold: expected a number or one for each row of x {tuple(x.shape)}, got threshold of shape "
                f"{tuple(threshold.shape)}"
            )
        limits = threshold.detach().to(wide)
    elif isinstance(threshold, Tensor):
        limits = threshold.detach().to(wide).expand(x.shape[:-1])
    else:
        limits = torch.full(x.shape[:-1], _threshold(threshold), dtype=wide, device=x.device)
    needs_grad = x.requires_grad and torch.is_grad_enabled()
    call = _TOPK_THRESHOLD if _dispatched(x) else topk_threshold_reference
    values, indices, starts = call(x.detach() if needs_grad else x, limits)
    if needs_grad:
        row = torch.arange(len(starts) - 1, device=x.device).repeat_interleave(starts.diff())
        values = x.reshape(len(starts) - 1, x.shape[-1])[row, indices]
    return Reaching(values, indices, starts)


def _rows_last(x: Tensor, dim: int, caller: str) -> Tensor:
    """Check x, and move the rows' dimension to the end."""
    if tensor(x, "x", caller).dtype not in _DTYPES:
        raise DtypeError(
            f"{caller}: x must be of a floating dtype, got {x.dtype}; float64, float32, bfloat16 and float16 are taken"
        )
    dim = whole(dim, "dim", caller)
    if not -x.dim() <= dim < x.dim():
        raise ShapeError(f"{caller}: x of shape {tuple(x.shape)} has no dim {dim}")
    return x if dim in (-1, x.dim() - 1) else x.movedim(dim, -1)


def _threshold(value: object) -> float:
    """Return a threshold that is no tensor."""
    try:
        return real(value, "threshold", "topk_threshold")
    except ConfigError:
        raise ConfigError(
            f"topk_threshold: threshold must be a number or a tensor of one for each row, got threshold={value!r}"
        ) from None


def _wrong_count(k: int, most: int, what: str, caller: str) -> ConfigError:
    return ConfigError(f"{caller}: k must be from 0 to {most}, {what}, got k={k}")


def _dispatched(x: Tensor) -> bool:
    """Say whether the dispatcher may be asked: on a CPU its kernels take three dtypes."""
    return x.dtype in _NATIVE or x.device.type != "cpu"


def _fake(x: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int64)


def _fake_threshold(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.library.get_ctx().new_dynamic_size()
    starts = x.new_empty(threshold.numel() + 1, dtype=torch.int64)
    return x.new_empty(found), x.new_empty(found, dtype=torch.int64), starts


define(
    "topk(Tensor x, int k, bool sorted) -> (Tensor, Tensor)", topk_reference, lambda x, k, sorted: _fake(x, k, x.dtype)
)
define(
    "topk_approximate(Tensor x, int k, int buckets, int kept, bool sorted) -> (Tensor, Tensor)",
    topk_approximate_reference,
    lambda x, k, buckets, kept, sorted: _fake(x, k, x.dtype),
)
define(
    "topk_grouped(Tensor x, int k, int group, bool sum, bool sorted) -> (Tensor, Tensor)",
    topk_grouped_reference,
    lambda x, k, group, sum, sorted: _fake(x, k, torch.float64 if x.dtype == torch.float64 else torch.float32),
)
define(
    "topk_threshold(Tensor x, Tensor threshold) -> (Tensor, Tensor, Tensor)", topk_threshold_reference, _fake_threshold
)

# The overloads themselves: to find one through its packet costs a microsecond a call.
_TOPK = torch.ops.nogemm.topk.default
_TOPK_APPROXIMATE = torch.ops.nogemm.topk_approximate.default
_TOPK_GROUPED = torch.ops.nogemm.topk_grouped.default
_TOPK_THRESHOLD = torch.ops.nogemm.topk_threshold.default
