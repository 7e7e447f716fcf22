"""hadamard: values, involution, exactness on whole numbers, gradient, instruction sets, threads."""

import math

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import hadamard
from nogemm.ops.hadamard import hadamard_reference
from nogemm.testing.compare import Mismatch, check_equal, check_sum

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", WIDTHS)
def test_matches_float64(isa: str, width: int, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 3, 17):
        x = torch.randn(tokens, width).to(dtype)
        exact = hadamard_reference(x.double())
        magnitude = x.double().abs().sum(-1, keepdim=True).expand_as(exact) / math.sqrt(width)
        check_sum("hadamard", hadamard(x), exact, magnitude, width.bit_length() + 1)


def test_check_would_notice_a_wrong_sign() -> None:
    x = torch.randn(3, 64)
    exact = hadamard_reference(x.double())
    wrong = hadamard(x)
    wrong[1, 5] *= -1
    magnitude = x.double().abs().sum(-1, keepdim=True).expand_as(exact) / 8
    with pytest.raises(Mismatch, match="flat index 69"):
        check_sum("hadamard", wrong, exact, magnitude, 7)


def test_whole_numbers_are_exact(isa: str) -> None:
    x = torch.randint(-8, 9, (9, 256)).float()
    check_equal("hadamard", hadamard(x), (x.double() @ sylvester(256) / 16).float())


def test_threads_give_equal_bits(isa: str) -> None:
    x = torch.randn(3001, 512)
    torch.set_num_threads(1)
    one = hadamard(x)
    torch.set_num_threads(2)
    check_equal("two threads", hadamard(x), one)


def test_leading_dims_and_strides(isa: str) -> None:
    x = torch.randn(4, 64, 3).transpose(1, 2)
    check_equal("strided", hadamard(x), hadamard(x.contiguous()))


def test_gradient() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, (x,))
    y = torch.randn(3, 8, requires_grad=True)
    (grad,) = torch.autograd.grad((hadamard(y) * torch.arange(8.0)).sum(), y)
    torch.testing.assert_close(grad, hadamard_reference(torch.arange(8.0)).expand(3, 8))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.nogemm.hadamard, (torch.randn(3, 16, requires_grad=True),))


def test_width_must_be_a_power_of_two() -> None:
    with pytest.raises(ShapeError, match=r"power of two.*\(2, 12\)"):
        hadamard(torch.randn(2, 12))
