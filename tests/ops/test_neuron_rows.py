"""neuron_dot, neuron_sum and the gradients into rows: values, padding, index range, determinism, sparse gradients."""

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import neuron_dot, neuron_dot_reference, neuron_sum, neuron_sum_reference
from nogemm.ops.neuron_rows import (
    neuron_dot_backward_reference,
    neuron_outer_reference,
    neuron_outer_visited_reference,
    neuron_sum_backward_reference,
)
from nogemm.testing.compare import Mismatch, check_equal, check_sum

Shape = tuple[int, int, int, int]
# tokens, rows per token, rows, width: with few uses of each row and with many, empty, and of odd widths.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (3, 5, 200, 37),
    (65, 10, 1023, 130),
    (70, 6, 9, 64),
    (130, 17, 50, 201),
    (2, 0, 4, 8),
    (0, 3, 4, 8),
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
by_shape = pytest.mark.parametrize("shape", SHAPES)


def draw(shape: Shape, dtype: torch.dtype = torch.float32, padding: bool = True) -> tuple[torch.Tensor, ...]:
    tokens, visits, rows, width = shape
    index = torch.randint(-1 if padding else 0, rows, (tokens, visits), dtype=torch.int32)
    floats = (torch.randn(tokens, visits), torch.randn(tokens, width), torch.randn(rows, width), torch.randn(rows))
    return index, *(t.to(dtype) for t in floats)


def test_hand_worked() -> None:
    index = torch.tensor([[0, 2], [2, -1]], dtype=torch.int32)
    rows = torch.tensor([[1.0, 0.0], [9.0, 9.0], [2.0, 3.0]])
    x = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    assert neuron_dot(x, index, rows).tolist() == [[1.0, 5.0], [1.0, 0.0]]
    assert neuron_dot(x, index, rows, torch.tensor([0.5, 7.0, -1.0])).tolist() == [[1.5, 4.0], [0.0, 0.0]]
    weight = torch.tensor([[2.0, 1.0], [1.0, 8.0]])
    assert neuron_sum(weight, index, rows).tolist() == [[4.0, 3.0], [2.0, 3.0]]
    grad = torch.ops.nogemm.neuron_outer(weight, index, x, 3)
    assert grad.tolist() == [[2.0, 2.0], [0.0, 0.0], [3.0, 0.0]]
    visited, values = torch.ops.nogemm.neuron_outer_visited(weight, index, x, 3)
    assert visited.tolist() == [0, 2]
    assert values.tolist() == [[2.0, 2.0], [3.0, 0.0]]


@both_dtypes
@by_shape
def test_values_match_float64(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    index, weight, x, rows, bias = draw(shape, dtype)
    w, v, r, b = (t.double() for t in (weight, x, rows, bias))
    exact, size = neuron_dot_reference(v, index, r, b), neuron_dot_reference(v.abs(), index, r.abs(), b.abs())
    check_sum("dot", neuron_dot(x, index, rows, bias), exact, size, shape[3] + 1)
    exact, size = neuron_sum_reference(w, index, r), neuron_sum_reference(w.abs(), index, r.abs())
    check_sum("sum", neuron_sum(weight, index, rows), exact, size, shape[1])
    exact = neuron_outer_reference(w, index, v, shape[2])
    size = neuron_outer_reference(w.abs(), index, v.abs(), shape[2])
    got = torch.ops.nogemm.neuron_outer(weight, index, x, shape[2])
    check_sum("outer", got, exact, size, max(shape[0] * shape[1], 1))
    visited, values = torch.ops.nogemm.neuron_outer_visited(weight, index, x, shape[2])
    assert visited.tolist() == sorted(set(index.flatten().tolist()) - {-1})
    check_equal("the visited rows are the dense ones", values, got[visited.long()])


@both_dtypes
@by_shape
def test_gradients_match_float64(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    index, weight, x, rows, _ = draw(shape, dtype)
    grad = torch.randn(shape[0], shape[3]).to(dtype)
    terms = max(shape[0] * shape[1], shape[3])
    w, v, r, g = (t.double() for t in (weight, x, rows, grad))
    got = torch.ops.nogemm.neuron_dot_backward(weight, x, index, rows)
    exact = neuron_dot_backward_reference(w, v, index, r)
    size = neuron_dot_backward_reference(w.abs(), v.abs(), index, r.abs())
    for name, a, b, c in zip(("x", "rows", "bias"), got, exact, size, strict=True):
        check_sum(f"dot: grad of {name}", a, b, c, terms)
    got = torch.ops.nogemm.neuron_sum_backward(grad, weight, index, rows)
    exact = neuron_sum_backward_reference(g, w, index, r)
    size = neuron_sum_backward_reference(g.abs(), w.abs(), index, r.abs())
    for name, a, b, c in zip(("weight", "rows"), got, exact, size, strict=True):
        check_sum(f"sum: grad of {name}", a, b, c, terms)


def test_check_would_notice_a_row_off_by_one() -> None:
    index, weight, x, rows, _ = draw((9, 3, 8, 16), padding=False)
    w, v, r = weight.double(), x.double(), rows.double()
    wrong = index.clone()
    wrong[3, 2] = (wrong[3, 2] + 1) % 8
    size = neuron_sum_reference(w.abs(), index, r.abs())
    with pytest.raises(Mismatch):
        check_sum("off by one", neuron_sum(weight, wrong, rows), neuron_sum_reference(w, index, r), size, 3)
    size = neuron_dot_reference(v.abs(), index, r.abs())
    with pytest.raises(Mismatch):
        check_sum("off by one", neuron_dot(x, wrong, rows), neuron_dot_reference(v, index, r), size, 16)


@pytest.mark.parametrize("shape", [(900, 30, 300, 150), (1200, 12, 4095, 200)])
def test_threads_give_equal_bits(isa: str, shape: Shape) -> None:
    index, weight, x, rows, bias = draw(shape)
    grad = torch.randn(shape[0], shape[3])
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        dots, sums = neuron_dot(x, index, rows, bias), neuron_sum(weight, index, rows)
        outer = torch.ops.nogemm.neuron_outer(weight, index, x, shape[2])
        back = torch.ops.nogemm.neuron_dot_backward(weight, x, index, rows)
        results.append((dots, sums, outer, *back, *torch.ops.nogemm.neuron_sum_backward(grad, weight, index, rows)))
    for one, two in zip(*results, strict=True):
        check_equal("threads", two, one)


@pytest.mark.parametrize("bad", [8, 2**31 - 1])
def test_indices_out_of_range_are_refused(isa: str, bad: int) -> None:
    index, weight, x, rows, _ = draw((4, 3, 8, 5))
    index[2, 1] = bad
    calls = (
        lambda: neuron_dot(x, index, rows),
        lambda: neuron_sum(weight, index, rows),
        lambda: torch.ops.nogemm.neuron_outer(weight, index, x, 8),
        lambda: torch.ops.nogemm.neuron_outer_visited(weight, index, x, 8),
    )
    for call in calls:
        with pytest.raises(IndexError, match=rf"index\[2, 1\] = {bad} is outside"):
            call()


def test_nan_stays_in_its_row(isa: str) -> None:
    index, weight, x, rows, _ = draw((5, 3, 8, 20), padding=False)
    clean = neuron_sum(weight, index, rows), neuron_dot(x, index, rows)
    weight[2, 1], x[2, 19] = float("nan"), float("nan")
    for got, before in zip((neuron_sum(weight, index, rows), neuron_dot(x, index, rows)), clean, strict=True):
        assert got[2].isnan().all()
        check_equal("others", got[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_gradcheck_opcheck_and_strides(isa: str) -> None:
    index, weight, x, rows, bias = draw((6, 3, 8, 5))
    wide = [t.double().requires_grad_() for t in (weight, x, rows, bias)]
    assert torch.autograd.gradcheck(lambda w, r: neuron_sum(w, index, r), (wide[0], wide[2]))
    assert torch.autograd.gradcheck(lambda v, r, b: neuron_dot(v, index, r, b), (wide[1], wide[2], wide[3]))
    shaped, biases = rows.view(2, 4, 5).requires_grad_(), bias.requires_grad_()
    torch.library.opcheck(torch.ops.nogemm.neuron_sum, (weight.requires_grad_(), index, shaped, False))
    torch.library.opcheck(torch.ops.nogemm.neuron_dot, (x.requires_grad_(), index, shaped, biases, False))
    torch.library.opcheck(torch.ops.nogemm.neuron_outer, (weight.detach(), index, x.detach(), 8))
    torch.library.opcheck(torch.ops.nogemm.neuron_outer_visited, (weight.detach(), index, x.detach(), 8))
    x, swapped = x.detach(), x.detach().T.contiguous().T
    check_equal("strided", neuron_dot(swapped, index.T.contiguous().T, rows), neuron_dot(x, index, rows))


@pytest.mark.parametrize("shape", [(70, 5, 31, 33), (20, 5, 300, 33)])
def test_native_gradients_match_float64_through_autograd(isa: str, shape: Shape) -> None:
    index, *floats = draw(shape)
    leaves, wide = ([t.clone().to(d).requires_grad_() for t in floats] for d in (torch.float32, torch.float64))
    for w, v, r, b in (leaves, wide):
        (neuron_sum(w, index, r).square().sum() + neuron_dot(v, index, r, b).square().sum()).backward()
    for got, exact in zip(leaves, wide, strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)


def test_sparse_gradients_are_the_dense_ones(isa: str) -> None:
    index, weight, x, rows, bias = draw((9, 2, 30, 8), padding=False)
    dense, sparse = rows.view(2, 15, 8).clone().requires_grad_(), rows.view(2, 15, 8).clone().requires_grad_()
    biases = bias.clone().requires_grad_(), bias.clone().requires_grad_()
    for leaf, b, flag in zip((dense, sparse), biases, (False, True), strict=True):
        y = neuron_sum(weight, index, leaf, flag).square().sum()
        (y + neuron_dot(x, index, leaf, b, flag).square().sum()).backward()
    assert sparse.grad is not None
    assert dense.grad is not None
    assert sparse.grad.is_sparse
    assert sparse.grad.coalesce().values().shape == (len(index.unique()), 8)
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    torch.testing.assert_close(biases[1].grad, biases[0].grad)


def test_visited_reference_holds_the_rows_of_the_dense_one() -> None:
    index, weight, x, _, _ = draw((9, 2, 30, 8))
    visited, values = neuron_outer_visited_reference(weight, index, x, 30)
    assert visited.tolist() == sorted(set(index.flatten().tolist()) - {-1})
    torch.testing.assert_close(values, neuron_outer_reference(weight, index, x, 30)[visited.long()])


def test_errors_name_the_tensors() -> None:
    index, weight, x, rows, _ = draw((2, 3, 8, 5))
    with pytest.raises(ShapeError, match=r"neuron_sum: weight \(2, 2\)"):
        neuron_sum(weight[:, :2], index, rows)
    with pytest.raises(ShapeError, match=r"neuron_dot.*\(2, 5\), index \(3, 2\)"):
        neuron_dot(x, index.T, rows)
