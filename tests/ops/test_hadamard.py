"""hadamard: values, orders 12 and 20, exactness on whole numbers, gradient, instruction sets, threads."""

import math

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import hadamard
from nogemm.ops.hadamard import hadamard_flops, hadamard_matrix, hadamard_order, hadamard_reference
from nogemm.testing.compare import Mismatch, check_equal, check_sum

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096)
OTHER_WIDTHS = (12, 24, 48, 192, 768, 3072, 20, 40, 160, 640, 1280)
# How far rounding grows in the steps of order m (csrc/kernels/hadamard_steps.h), as additions on the longest way.
GROWTH = {1: 0, 12: 10, 20: 30}


def terms(width: int) -> int:
    order = hadamard_order(width)
    return (width // order).bit_length() + 1 + GROWTH[order]


def sylvester(width: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < width:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_reference_is_sylvesters_matrix(width: int) -> None:
    x = torch.randn(5, width, dtype=torch.float64)
    torch.testing.assert_close(hadamard_reference(x), x @ sylvester(width) / math.sqrt(width), rtol=1e-13, atol=1e-13)


def test_hand_worked() -> None:
    assert hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [5.0, -1.0, -2.0, 0.0]


@pytest.mark.parametrize("order", [12, 20])
def test_matrices_are_symmetric_hadamard_matrices(order: int) -> None:
    h = hadamard_matrix(order)
    assert h.shape == (order, order)
    assert set(h.flatten().tolist()) == {1.0, -1.0}
    assert torch.equal(h, h.T)
    assert torch.equal(h @ h, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(("width", "order"), [(12, 12), (96, 12), (20, 20), (1280, 20)])
def test_reference_is_the_kronecker_product(width: int, order: int) -> None:
    x = torch.randn(5, width, dtype=torch.float64)
    h = torch.kron(hadamard_matrix(order), sylvester(width // order))
    torch.testing.assert_close(hadamard_reference(x), x @ h / math.sqrt(width), rtol=1e-12, atol=1e-12)


def test_order_is_found() -> None:
    orders = {width: hadamard_order(width) for width in range(100)}
    assert {width: m for width, m in orders.items() if m} == {
        **dict.fromkeys((1, 2, 4, 8, 16, 32, 64), 1),
        **dict.fromkeys((12, 24, 48, 96), 12),
        **dict.fromkeys((20, 40, 80), 20),
    }


def test_flops_of_the_orders_by_hand() -> None:
    assert hadamard_flops(1024) == 1024 * 10
    # Order 12: three fours of 12 additions, two times 4 to add them up, 12 multiply-adds.
    assert hadamard_flops(12) == 3 * 12 + 2 * 4 + 2 * 12
    # Order 20: 20, then two times: 14 for lines and total, 1, 3 + 9 + 9 multiply-adds, 10.
    assert hadamard_flops(20) == 20 + 2 * (14 + 1 + 2 * 21 + 10)
    assert hadamard_flops(768) == 64 * hadamard_flops(12) + 768 * 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS + OTHER_WIDTHS)
def test_matches_float64(isa: str, width: int, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 3, 17):
        x = torch.randn(tokens, width).to(dtype)
        exact = hadamard_reference(x.double())
        magnitude = x.double().abs().sum(-1, keepdim=True).expand_as(exact) / math.sqrt(width)
        check_sum("hadamard", hadamard(x), exact, magnitude, terms(width))


@pytest.mark.parametrize("width", [64, 48, 80])
def test_check_would_notice_a_wrong_sign(width: int) -> None:
    x = torch.randn(3, width)
    exact = hadamard_reference(x.double())
    wrong = hadamard(x)
    wrong[1, 5] *= -1
    magnitude = x.double().abs().sum(-1, keepdim=True).expand_as(exact) / math.sqrt(width)
    with pytest.raises(Mismatch, match=f"flat index {width + 5} "):
        check_sum("hadamard", wrong, exact, magnitude, terms(width))


def test_whole_numbers_are_exact(isa: str) -> None:
    x = torch.randint(-8, 9, (9, 256)).float()
    check_equal("hadamard", hadamard(x), (x.double() @ sylvester(256) / 16).float())


@pytest.mark.parametrize("width", [12, 20, 96, 320])
def test_twice_is_the_identity(isa: str, width: int) -> None:
    x = torch.randn(4, width)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [512, 384, 320])
def test_threads_give_equal_bits(isa: str, width: int) -> None:
    x = torch.randn(3001, width)
    torch.set_num_threads(1)
    one = hadamard(x)
    torch.set_num_threads(2)
    check_equal("two threads", hadamard(x), one)


@pytest.mark.parametrize("width", [64, 96, 40])
def test_leading_dims_and_strides(isa: str, width: int) -> None:
    x = torch.randn(4, width, 3).transpose(1, 2)
    check_equal("strided", hadamard(x), hadamard(x.contiguous()))


@pytest.mark.parametrize("width", [8, 12, 40])
def test_gradient(width: int) -> None:
    x = torch.randn(3, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, (x,))
    y, factor = torch.randn(3, width, requires_grad=True), torch.arange(float(width))
    (grad,) = torch.autograd.grad((hadamard(y) * factor).sum(), y)
    torch.testing.assert_close(grad, hadamard_reference(factor).expand(3, width), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [16, 12, 40])
def test_opcheck(width: int) -> None:
    torch.library.opcheck(torch.ops.nogemm.hadamard, (torch.randn(3, width, requires_grad=True),))


def test_not_finite_rows_stay_alone(isa: str) -> None:
    for width in (48, 80):
        x = torch.randn(3, width)
        x[1, 7] = float("nan")
        y = hadamard(x)
        assert y[1].isnan().all()
        check_equal("other rows", y[::2], hadamard(x[::2]))


@pytest.mark.parametrize("width", [6, 10, 14, 28, 36])
def test_other_widths_are_refused(width: int) -> None:
    with pytest.raises(ShapeError, match=rf"m 2\^k with m 1, 12 or 20.*\(2, {width}\)"):
        hadamard(torch.randn(2, width))
    with pytest.raises(Exception, match="m 1, 12 or 20"):
        torch.ops.nogemm.hadamard(torch.randn(2, width))
