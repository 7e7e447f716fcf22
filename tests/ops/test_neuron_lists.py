"""list_dots, list_sum, neurons_at_indices: values, gradients, padding, index range, determinism."""

import pytest
import torch
import torch.nn.functional as F

from nogemm.errors import ShapeError
from nogemm.ops import list_dots, list_sum, neurons_at_indices
from nogemm.ops.neuron_lists import (
    list_dots_backward_reference,
    list_dots_reference,
    list_sum_backward_reference,
    list_sum_reference,
)
from nogemm.testing.compare import Mismatch, check_equal, check_sum

Shape = tuple[int, int, int, int]
# tokens, list length, neurons, width: with few uses per neuron, with many, and with odd widths.
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (3, 5, 200, 37),
    (70, 6, 9, 64),
    (130, 17, 50, 201),
    (2, 0, 4, 8),
    (0, 3, 4, 8),
)


def draw(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, count, neurons, width = shape
    index = torch.randint(-1, neurons, (tokens, count), dtype=torch.int32)
    return torch.randn(tokens, width), index, torch.randn(neurons, width), torch.randn(neurons)


def test_hand_worked() -> None:
    x = torch.tensor([[1.0, 2.0]])
    index = torch.tensor([[2, -1, 0]], dtype=torch.int32)
    rows = torch.tensor([[1.0, 0.0], [9.0, 9.0], [3.0, -1.0]])
    assert list_dots(x, index, rows, torch.tensor([0.5, 0.0, 0.0])).tolist() == [[1.0, 0.0, 1.5]]
    assert list_sum(torch.tensor([[2.0, 7.0, 1.0]]), index, rows).tolist() == [[7.0, -2.0]]
    y = neurons_at_indices(x, index, rows, None, rows, F.relu)
    assert y.tolist() == [[1 * 3.0 + 1 * 1.0, 1 * -1.0 + 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_match_float64(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    x, index, rows, bias = (t if t.dtype == torch.int32 else t.to(dtype) for t in draw(shape))
    weights = torch.randn(index.shape).to(dtype)
    wide = [t.double() for t in (x, rows, bias, weights)]
    exact = list_dots_reference(wide[0], index, wide[1], wide[2])
    size = list_dots_reference(wide[0].abs(), index, wide[1].abs(), wide[2].abs())
    check_sum("dots", list_dots(x, index, rows, bias), exact, size, shape[3] + 1)
    exact = list_sum_reference(wide[3], index, wide[1])
    size = list_sum_reference(wide[3].abs(), index, wide[1].abs())
    check_sum("sum", list_sum(weights, index, rows), exact, size, shape[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_match_float64(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    x, index, rows, _ = (t if t.dtype == torch.int32 else t.to(dtype) for t in draw(shape))
    weights, grad = torch.randn(index.shape).to(dtype), torch.randn(shape[0], shape[3]).to(dtype)
    terms = max(shape[0] * shape[1], shape[3])
    wide = [t.double() for t in (weights, x, rows, grad)]
    got = torch.ops.nogemm.list_dots_backward(weights, x, index, rows)
    exact = list_dots_backward_reference(wide[0], wide[1], index, wide[2])
    size = list_dots_backward_reference(wide[0].abs(), wide[1].abs(), index, wide[2].abs())
    for name, a, b, c in zip(("x", "rows", "bias"), got, exact, size, strict=True):
        check_sum(f"dots: grad of {name}", a, b, c, terms)
    got = torch.ops.nogemm.list_sum_backward(grad, weights, index, rows)
    exact = list_sum_backward_reference(wide[3], wide[0], index, wide[2])
    size = list_sum_backward_reference(wide[3].abs(), wide[0].abs(), index, wide[2].abs())
    for name, a, b, c in zip(("weights", "rows"), got, exact, size, strict=True):
        check_sum(f"sum: grad of {name}", a, b, c, terms)


def test_check_would_notice_a_wrong_neuron() -> None:
    x, index, rows, _ = draw((9, 4, 20, 16))
    exact = list_dots_reference(x.double(), index, rows.double())
    size = list_dots_reference(x.double().abs(), index, rows.double().abs())
    wrong = index.clone()
    wrong[4, 2] = (wrong[4, 2] + 1) % 20
    with pytest.raises(Mismatch):
        check_sum("wrong", list_dots(x, wrong, rows), exact, size, 16)


def test_threads_give_equal_bits(isa: str) -> None:
    x, index, rows, bias = draw((900, 30, 300, 150))
    grad = torch.randn(900, 150)
    weights = torch.randn(index.shape)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        dots = list_dots(x, index, rows, bias)
        back = torch.ops.nogemm.list_dots_backward(weights, x, index, rows)
        y = list_sum(weights, index, rows)
        results.append((dots, *back, y, *torch.ops.nogemm.list_sum_backward(grad, weights, index, rows)))
    for one, two in zip(*results, strict=True):
        check_equal("threads", two, one)


def test_gradcheck_and_opcheck() -> None:
    x, index, rows, bias = draw((5, 3, 6, 4))
    gate, down = torch.randn(6, 4), torch.randn(6, 2)
    wide = [t.double().requires_grad_() for t in (x, rows, bias, gate, down)]

    def layer(x: torch.Tensor, up: torch.Tensor, b: torch.Tensor, g: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        return neurons_at_indices(x, index, up, b, d, F.silu, gate_FD=g, gate_bias_F=b)

    assert torch.autograd.gradcheck(layer, tuple(wide))
    leaves = [t.requires_grad_() for t in (x, rows, bias)]
    torch.library.opcheck(torch.ops.nogemm.list_dots, (leaves[0], index, leaves[1], leaves[2]))
    weights = torch.randn(index.shape).requires_grad_()
    torch.library.opcheck(torch.ops.nogemm.list_sum, (weights, index, leaves[1]))


def test_native_autograd_matches_the_reference() -> None:
    x, index, rows, bias = draw((40, 5, 12, 30))
    found = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.clone().to(dtype).requires_grad_() for t in (x, rows, bias)]
        y = neurons_at_indices(leaves[0], index, leaves[1], leaves[2], leaves[1], F.gelu)
        y.square().sum().backward()
        found.append([t.grad for t in leaves])
    for ours, exact in zip(*found, strict=True):
        assert ours is not None
        assert exact is not None
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bad", [6, 2**31 - 1])
def test_indices_out_of_range_are_refused(isa: str, bad: int) -> None:
    x, index, rows, _ = draw((4, 3, 6, 5))
    index[2, 1] = bad
    for call in (lambda: list_dots(x, index, rows), lambda: list_sum(torch.ones(4, 3), index, rows)):
        with pytest.raises(IndexError, match=rf"index\[2, 1\] = {bad} is outside"):
            call()


def test_tokens_that_are_not_finite_stay_alone() -> None:
    x, index, rows, bias = draw((6, 3, 8, 5))
    index = index.abs()
    clean = neurons_at_indices(x, index, rows, bias, rows, F.relu)
    x[1, 0], x[4, 2] = float("nan"), -float("inf")
    got = neurons_at_indices(x, index, rows, bias, rows, F.relu)
    assert got[[1, 4]].isnan().all()
    check_equal("others", got[[0, 2, 3, 5]], clean[[0, 2, 3, 5]])


def test_strides_and_errors() -> None:
    x, index, rows, _ = draw((6, 3, 8, 5))
    swapped = x.T.contiguous().T
    check_equal("strided", list_dots(swapped, index.T.contiguous().T, rows), list_dots(x, index, rows))
    with pytest.raises(ShapeError, match=r"list_dots.*\(6, 5\), index \(3, 6\)"):
        list_dots(x, index.T, rows)
    with pytest.raises(ShapeError, match="differ"):
        list_sum(torch.ones(6, 2), index, rows)
