"""topk and its kin: order, ties, NaN, bad rows, every instruction set and dtype, threads, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import nogemm
from nogemm import ops
from nogemm.errors import ConfigError, DtypeError, ShapeError
from nogemm.ops.topk import approximate_plan, group_scores, topk_approximate_reference, topk_reference
from nogemm.testing.compare import check_equal

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bad_rows(n: int) -> Tensor:
    """Rows that spoil a floor, a guess or a bucket: sorted, equal, few values, infinite, NaN, huge, tiny, periodic."""
    place = torch.arange(n)
    x = torch.randn(18, n)
    x[1] = place
    x[2] = -place
    x[3] = 0.25
    x[4] = -x[4].abs()
    x[5] = -INF
    x[6, 3::5] = -INF
    x[7, n // 3 :] = INF
    x[8, ::7] = NAN
    x[9] = NAN
    x[10] = x[10].round()
    x[11] *= 1e30
    x[12] *= 1e-40
    x[13] = place % 7
    x[14] = torch.where(place % 64 == 5, 9.0, x[14])  # all large numbers in one bucket
    x[15] = 1 + place * 1e-7
    x[16] = torch.where(place == n - 1, 1.0, -INF)
    x[17] = torch.where(place % 2 == 0, 0.0, -0.0)
    return x


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    check_equal("indices", got[1], expected[1])
    assert got[0].dtype == expected[0].dtype
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0, equal_nan=True)


def test_hand_worked() -> None:
    x = torch.tensor([[2.0, NAN, 3.0, -INF, 3.0], [-0.0, 0.0, -1.0, INF, -2.0]])
    got = nogemm.topk(x, 4)
    assert got.indices.tolist() == [[1, 2, 4, 0], [3, 0, 1, 2]]
    assert nogemm.topk(x, 3, sorted=False).indices.tolist() == [[1, 2, 4], [0, 1, 3]]
    assert nogemm.topk_grouped(x, 2, group=2, score="max").indices.tolist() == [[0, 1], [1, 0]]
    reaching = nogemm.topk_threshold(x, 0.0)
    assert reaching.indices.tolist() == [0, 1, 2, 4, 0, 1, 3]
    assert reaching.starts.tolist() == [0, 4, 7]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 15, 64, 257, 4097])
def test_bad_rows_are_a_stable_sort(isa: str, n: int, dtype: torch.dtype) -> None:
    x = bad_rows(n).to(dtype)
    for k in sorted({0, 1, min(2, n), min(50, n), n // 20, n // 3, n}):
        for in_order in (True, False):
            check(nogemm.topk(x, k, sorted=in_order), topk_reference(x, k, in_order))


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 999)
    values, indices = nogemm.topk(x, 20)
    with pytest.raises(AssertionError):
        check((values, indices.roll(1, -1)), topk_reference(x, 20, True))
    with pytest.raises(AssertionError):
        check((values + 1e-6, indices), topk_reference(x, 20, True))


@pytest.mark.parametrize("method", ["exact", "approximate"])
def test_a_long_row_is_the_same_for_any_number_of_threads(isa: str, method: str) -> None:
    n = 70_001
    x = torch.randn(1, n)
    x[0, 1000:1400] = 5.0
    for row in (x, x.sort().values, torch.where(torch.arange(n) == 9, NAN, x)):
        for k in (60, n // 20, n // 2):
            torch.set_num_threads(1)
            alone = nogemm.topk(row, k, method=method)
            torch.set_num_threads(2)
            check(nogemm.topk(row, k, method=method), alone)
            if method == "exact":
                check(alone, topk_reference(row, k, True))


@pytest.mark.parametrize("kept", [1, 2, 3, 4])
@pytest.mark.parametrize(("n", "buckets"), [(640, 128), (2003, 192), (1100, 1024)])
def test_buckets_are_those_of_the_reference(isa: str, n: int, buckets: int, kept: int) -> None:
    x = bad_rows(n)
    for dtype, k in zip(DTYPES, (40, 1, 128), strict=True):
        args = (x.to(dtype), k, buckets, kept, dtype != torch.bfloat16)
        check(torch.ops.nogemm.topk_approximate(*args), topk_approximate_reference(*args))


def test_recall_is_what_was_promised() -> None:
    for n, k, recall in ((8192, 50, 0.95), (20_000, 1000, 0.9), (8192, 256, 0.99)):
        plan = approximate_plan(n, k, recall)
        assert plan is not None
        x = torch.randn(200, n)
        found = torch.zeros(200, n, dtype=torch.bool).scatter_(1, nogemm.topk(x, k).indices, True)
        got = nogemm.topk(x, k, method="approximate", recall=recall)
        shares = found.gather(1, got.indices).double().mean(1)
        error = float(shares.std() / 200**0.5)
        expected = ops.expected_recall(n, k, *plan)
        assert expected >= recall
        assert abs(float(shares.mean()) - expected) < 4 * error
        assert abs(float(shares.mean()) - ops.expected_recall(n, k, plan[0] // 2, plan[1])) > 4 * error
    assert approximate_plan(8192, 50, 1.0) is None
    assert approximate_plan(8192, 0, 0.9) is None
    assert approximate_plan(100, 50, 0.9) is None


def test_approximate_is_exact_where_buckets_cannot_answer() -> None:
    x = torch.randn(2, 8192)
    x[0, 5::64] = NAN
    x[1] = -INF
    x[1, 7::128] = 1.0
    assert approximate_plan(8192, 60, 0.9) is not None
    check(nogemm.topk(x, 60, method="approximate", recall=0.9), nogemm.topk(x, 60))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["sum", "max"])
@pytest.mark.parametrize(("n", "group"), [(1, 1), (130, 8), (1003, 7), (64, 100)])
def test_groups_match_the_reference(isa: str, n: int, group: int, score: str, dtype: torch.dtype) -> None:
    x = bad_rows(n).to(dtype)
    groups = -(-n // group)
    for k in {0, 1, groups // 3, groups}:
        got = nogemm.topk_grouped(x, k, group=group, score=score)
        check(got, topk_reference(group_scores(x, group, score), k, True))
        assert got.values.dtype == torch.float32
    wide = torch.stack([part.double().sum(-1) for part in x[0].split(group)])
    size = torch.stack([part.double().abs().sum(-1) for part in x[0].split(group)])
    assert ((group_scores(x[0], group).double() - wide).abs() <= group * 2.0**-24 * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_thresholds_match_a_comparison(isa: str, dtype: torch.dtype) -> None:
    for n in (1, 33, 20_000):
        x = bad_rows(n).to(dtype)[:: 1 if n < 100 else 3]
        limits = torch.linspace(-1, 1, len(x))
        limits[:4] = torch.tensor([NAN, INF, -INF, 0.0])
        for threshold in (limits, 0.5, -INF, NAN, torch.tensor(1.0)):
            got = nogemm.topk_threshold(x, threshold)
            each = threshold if isinstance(threshold, Tensor) and threshold.dim() else [float(threshold)] * len(x)
            assert got.starts[-1] == len(got.values) == len(got.indices)
            for r, limit in enumerate(each):
                own = slice(int(got.starts[r]), int(got.starts[r + 1]))
                wanted = x[r].isnan() if limit != limit else (x[r] >= limit) | x[r].isnan()
                check_equal("indices", got.indices[own], wanted.nonzero().flatten())
                torch.testing.assert_close(got.values[own], x[r][wanted], rtol=0, atol=0, equal_nan=True)


def test_shapes_strides_and_dims() -> None:
    x = torch.randn(4, 301, 3)
    for dim in (1, -2):
        got = nogemm.topk(x, 5, dim=dim)
        assert got.values.shape == (4, 5, 3)
        check_equal("values", got.values, x.topk(5, dim=dim).values)
    check_equal("values", nogemm.topk(x.transpose(0, 2), 2, dim=0).values, x.transpose(0, 2).topk(2, dim=0).values)
    check_equal("values", nogemm.topk(x[:, ::3].mT, 7).values, x[:, ::3].mT.topk(7).values)
    check_equal(
        "values", nogemm.topk_grouped(x, 2, group=4, dim=1).values, nogemm.topk_grouped(x.mT, 2, group=4).values.mT
    )
    assert nogemm.topk(x[0, :, 0], 5).indices.shape == (5,)
    for empty in (torch.zeros(0, 9), torch.zeros(2, 0, 9)):
        assert nogemm.topk(empty, 3).values.shape == (*empty.shape[:-1], 3)
        assert nogemm.topk_threshold(empty, 0.0).starts.tolist() == [0]
    assert nogemm.topk(torch.zeros(3, 0), 0).indices.shape == (3, 0)
    assert nogemm.topk_grouped(torch.zeros(3, 0), 0, group=4).indices.shape == (3, 0)
    assert nogemm.topk_threshold(torch.zeros(3, 0), 0.0).starts.tolist() == [0, 0, 0, 0]


def test_float64_takes_the_reference() -> None:
    x = torch.randn(3, 500, dtype=torch.float64)
    x[0, :2] = torch.tensor([9.0, 9.0 + 1e-14], dtype=torch.float64)  # equal in float32
    got = nogemm.topk(x, 2)
    assert got.values.dtype == torch.float64
    assert got.indices[0].tolist() == [1, 0]
    assert nogemm.topk(x, 40, method="approximate", recall=0.5).values.dtype == torch.float64
    assert nogemm.topk_grouped(x, 2, group=3).values.dtype == torch.float64
    assert nogemm.topk_threshold(x, 0.0).values.dtype == torch.float64


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "topk": lambda x: nogemm.topk(x, 5).values,
    "approximate": lambda x: nogemm.topk(x, 5, method="approximate", recall=0.5).values,
    "dim": lambda x: nogemm.topk(x, 1, dim=0).values,
    "sum": lambda x: nogemm.topk_grouped(x, 2, group=3).values,
    "max": lambda x: nogemm.topk_grouped(x, 2, group=3, score="max").values,
    "threshold": lambda x: nogemm.topk_threshold(x, 0.1).values,
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients(name: str) -> None:
    # Numbers that stand apart: a finite difference changes no choice.
    x = (torch.randperm(512).reshape(2, 256).double() / 256 - 1).requires_grad_()
    assert torch.autograd.gradcheck(CALLS[name], (x[:, :40].detach().requires_grad_(),))
    single = x.detach().float().requires_grad_()
    CALLS[name](single).sum().backward()
    values = CALLS[name](x)
    values.sum().backward()
    assert single.grad is not None
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    check_equal("gradient", single.grad, x.grad.float())
    torch.testing.assert_close(CALLS[name](single.detach()), values.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    x = torch.randn(3, 400).to(dtype)
    for op, args in (
        (torch.ops.nogemm.topk, (5, True)),
        (torch.ops.nogemm.topk_approximate, (5, 64, 2, False)),
        (torch.ops.nogemm.topk_grouped, (5, 8, True, True)),
        (torch.ops.nogemm.topk_threshold, (torch.zeros(3),)),
    ):
        torch.library.opcheck(op.default, (x, *args))


@pytest.mark.parametrize("name", CALLS)
def test_compiled_calls_are_whole_graphs(name: str, compiler: str) -> None:
    x = torch.randn(6, 300)
    backend = compiler if name == "topk" else "aot_eager"  # the slower one once
    compiled = torch.compile(CALLS[name], backend=backend, fullgraph=True)
    check_equal("values", compiled(x), CALLS[name](x))


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: nogemm.topk(x, 11), ConfigError, "k must be from 0 to 10, the numbers along dim -1, got k=11"),
        (lambda x: nogemm.topk(x, 3, dim=0), ConfigError, "from 0 to 2, the numbers along dim 0, got k=3"),
        (lambda x: nogemm.topk(x, -1), ConfigError, "k=-1"),
        (lambda x: nogemm.topk(x, 2, dim=2), ShapeError, r"x of shape \(2, 10\) has no dim 2"),
        (lambda x: nogemm.topk(x[0, 0], 1), ShapeError, r"shape \(\) has no dim -1"),
        (lambda x: nogemm.topk(x.int(), 1), DtypeError, r"floating dtype, got torch\.int32"),
        (lambda x: nogemm.topk(x, 1, method="fast"), ConfigError, "one of exact, approximate, got method='fast'"),
        (lambda x: nogemm.topk(x, 1, method="approximate", recall=0), ConfigError, "at most 1, got recall=0"),
        (lambda x: nogemm.topk_grouped(x, 1, group=0), ConfigError, "group=0"),
        (
            lambda x: nogemm.topk_grouped(x, 5, group=3),
            ConfigError,
            "from 0 to 4, the groups of 3 along dim -1, got k=5",
        ),
        (lambda x: nogemm.topk_grouped(x, 1, group=3, score="mean"), ConfigError, "one of sum, max, got score='mean'"),
        (lambda x: nogemm.topk_threshold(x, torch.zeros(3)), ShapeError, r"x \(2, 10\), got threshold of shape \(3,\)"),
    ],
)
def test_errors_speak(call: Callable[[Tensor], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call(torch.randn(2, 10))
