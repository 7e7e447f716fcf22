"""neuron_dot, neuron_sum and the gradients into rows: values, dtypes, index range, determinism, sparse gradients."""

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import neuron_dot, neuron_dot_reference, neuron_sum, neuron_sum_reference
from nogemm.ops.neuron_rows import neuron_outer_reference, neuron_outer_visited_reference
from nogemm.testing.compare import Mismatch, check_equal, check_sum

Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((1, 1, 1), (7, 3, 5), (63, 6, 37), (255, 8, 64), (40, 20, 130), (1023, 10, 384))
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
by_shape = pytest.mark.parametrize("shape", SHAPES)  # rows, visits, width


def draw(tokens: int, shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    rows, visits, width = shape
    index = torch.randint(0, rows, (tokens, visits), dtype=torch.int32)
    weight, x, matrix = torch.randn(tokens, visits), torch.randn(tokens, width), torch.randn(rows, width)
    return index, weight.to(dtype), x.to(dtype), matrix.to(dtype)


def test_hand_worked() -> None:
    index = torch.tensor([[0, 2], [2, 2]], dtype=torch.int32)
    rows = torch.tensor([[1.0, 0.0], [9.0, 9.0], [2.0, 3.0]])
    x = torch.tensor([[1.0, 1.0], [2.0, -1.0]])
    assert neuron_dot(x, index, rows).tolist() == [[1.0, 5.0], [1.0, 1.0]]
    weight = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert neuron_sum(weight, index, rows).tolist() == [[4.0, 3.0], [4.0, 6.0]]
    grad = torch.ops.nogemm.neuron_outer(weight, index, x, 3)
    assert grad.tolist() == [[2.0, 2.0], [0.0, 0.0], [5.0, -1.0]]
    visited, values = torch.ops.nogemm.neuron_outer_visited(weight, index, x, 3)
    assert visited.tolist() == [0, 2]
    assert values.tolist() == [[2.0, 2.0], [5.0, -1.0]]


@both_dtypes
@by_shape
def test_matches_float64(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 3, 65):
        index, weight, x, rows = draw(tokens, shape, dtype)
        w, v, r = weight.double(), x.double(), rows.double()
        size = neuron_dot_reference(v.abs(), index, r.abs())
        check_sum("dot", neuron_dot(x, index, rows), neuron_dot_reference(v, index, r), size, shape[2])
        size = neuron_sum_reference(w.abs(), index, r.abs())
        check_sum("sum", neuron_sum(weight, index, rows), neuron_sum_reference(w, index, r), size, shape[1])
        exact = neuron_outer_reference(w, index, v, shape[0])
        size = neuron_outer_reference(w.abs(), index, v.abs(), shape[0])
        got = torch.ops.nogemm.neuron_outer(weight, index, x, shape[0])
        check_sum("outer", got, exact, size, max(tokens * shape[1], 1))
        visited, values = torch.ops.nogemm.neuron_outer_visited(weight, index, x, shape[0])
        assert visited.tolist() == sorted(set(index.flatten().tolist()))
        check_equal("the visited rows are the dense ones", values, got[visited.long()])


def test_check_would_notice_a_row_off_by_one() -> None:
    index, weight, _, rows = draw(9, (8, 3, 16))
    exact = neuron_sum_reference(weight.double(), index, rows.double())
    size = neuron_sum_reference(weight.double().abs(), index, rows.double().abs())
    wrong = index.clone()
    wrong[3, 2] = (wrong[3, 2] + 1) % 8
    with pytest.raises(Mismatch):
        check_sum("off by one", neuron_sum(weight, wrong, rows), exact, size, 3)


def test_threads_give_equal_bits(isa: str) -> None:
    index, weight, x, rows = draw(3000, (127, 12, 200))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outer = torch.ops.nogemm.neuron_outer(weight, index, x, 127)
        results.append((neuron_dot(x, index, rows), neuron_sum(weight, index, rows), outer))
    for name, one, two in zip(("dot", "sum", "outer"), *results, strict=True):
        check_equal(name, two, one)


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1])
def test_indices_out_of_range_are_refused(isa: str, bad: int) -> None:
    index, weight, x, rows = draw(4, (8, 3, 5))
    index[2, 1] = bad
    calls = (
        lambda: neuron_dot(x, index, rows),
        lambda: neuron_sum(weight, index, rows),
        lambda: torch.ops.nogemm.neuron_outer(weight, index, x, 8),
        lambda: torch.ops.nogemm.neuron_outer_visited(weight, index, x, 8),
    )
    for call in calls:
        with pytest.raises((IndexError, RuntimeError), match=r"(?i)index"):
            call()


def test_nan_stays_in_its_row(isa: str) -> None:
    index, weight, x, rows = draw(5, (8, 3, 20))
    clean = neuron_sum(weight, index, rows), neuron_dot(x, index, rows)
    weight[2, 1], x[2, 19] = float("nan"), float("nan")
    for got, before in zip((neuron_sum(weight, index, rows), neuron_dot(x, index, rows)), clean, strict=True):
        assert got[2].isnan().all()
        check_equal("others", got[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_gradient_opcheck_and_strides(isa: str) -> None:
    index, weight, x, rows = draw(6, (8, 3, 5))
    wide = [t.double().requires_grad_() for t in (weight, x, rows)]
    assert torch.autograd.gradcheck(lambda w, r: neuron_sum(w, index, r), (wide[0], wide[2]))
    assert torch.autograd.gradcheck(lambda v, r: neuron_dot(v, index, r), (wide[1], wide[2]))
    shaped = rows.view(2, 4, 5).requires_grad_()
    torch.library.opcheck(torch.ops.nogemm.neuron_sum, (weight.requires_grad_(), index, shaped, False))
    torch.library.opcheck(torch.ops.nogemm.neuron_dot, (x.requires_grad_(), index, shaped, False))
    torch.library.opcheck(torch.ops.nogemm.neuron_outer, (weight.detach(), index, x.detach(), 8))
    torch.library.opcheck(torch.ops.nogemm.neuron_outer_visited, (weight.detach(), index, x.detach(), 8))
    swapped = x.detach().T.contiguous().T
    check_equal("strided", neuron_dot(swapped, index, rows), neuron_dot(x.detach(), index, rows))


def test_native_gradients_match_float64(isa: str) -> None:
    index, weight, x, rows = draw(70, (31, 5, 33))
    leaves = [t.clone().requires_grad_() for t in (weight, x, rows)]
    wide = [t.double().requires_grad_() for t in (weight, x, rows)]
    for w, v, r in (leaves, wide):
        (neuron_sum(w, index, r).square().sum() + neuron_dot(v, index, r).square().sum()).backward()
    for got, exact in zip(leaves, wide, strict=True):
        assert got.grad is not None
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=1e-4, atol=1e-3)


def test_sparse_gradients_are_the_dense_ones(isa: str) -> None:
    index, weight, _, rows = draw(9, (30, 2, 8))
    shaped = rows.view(2, 15, 8)
    dense, sparse = shaped.clone().requires_grad_(), shaped.clone().requires_grad_()
    neuron_sum(weight, index, dense).square().sum().backward()
    neuron_sum(weight, index, sparse, True).square().sum().backward()
    assert sparse.grad is not None
    assert dense.grad is not None
    assert sparse.grad.is_sparse
    assert sparse.grad.coalesce().values().shape == (len(index.unique()), 8)
    check_equal("sparse", sparse.grad.to_dense(), dense.grad)


def test_visited_reference_holds_the_rows_of_the_dense_one() -> None:
    index, weight, x, _ = draw(9, (30, 2, 8))
    visited, values = neuron_outer_visited_reference(weight, index, x, 30)
    torch.testing.assert_close(values, neuron_outer_reference(weight, index, x, 30)[visited.long()])


def test_errors_name_the_tensors() -> None:
    index, weight, x, rows = draw(2, (8, 3, 5))
    with pytest.raises(ShapeError, match=r"neuron_sum: weight \(2, 2\)"):
        neuron_sum(weight[:, :2], index, rows)
    with pytest.raises(ShapeError, match=r"neuron_dot: x \(2, 4\)"):
        neuron_dot(x[:, :4], index, rows)
