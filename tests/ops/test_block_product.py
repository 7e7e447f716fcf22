"""block_product: values and both gradients against float64, odd block shapes, threads, strides."""

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import block_product
from nogemm.ops.block_product import block_product_backward_reference, block_product_reference
from nogemm.testing.compare import Mismatch, check_equal, check_sum

SHAPES = ((1, 1, 1), (8, 64, 64), (3, 5, 7), (2, 33, 16), (16, 1, 4), (1, 128, 96), (4, 16, 16))


def test_hand_worked() -> None:
    y = block_product(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[[1.0, 1.0]], [[2.0, -1.0]]]))
    assert y.tolist() == [[3.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    blocks, _, in_width = shape
    weight = torch.randn(shape).to(dtype)
    for tokens in (0, 1, 2, 31, 130):
        x = torch.randn(tokens, blocks * in_width).to(dtype)
        exact = block_product_reference(x.double(), weight.double())
        magnitude = block_product_reference(x.double().abs(), weight.double().abs())
        check_sum("block_product", block_product(x, weight), exact, magnitude, in_width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_matches_float64(isa: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    blocks, out_width, in_width = shape
    weight = torch.randn(shape).to(dtype)
    for tokens in (0, 1, 37, 400):
        x = torch.randn(tokens, blocks * in_width).to(dtype)
        grad = torch.randn(tokens, blocks * out_width).to(dtype)
        got = torch.ops.nogemm.block_product_backward(grad, x, weight)
        exact = block_product_backward_reference(grad.double(), x.double(), weight.double())
        size = block_product_backward_reference(grad.double().abs(), x.double().abs(), weight.double().abs())
        check_sum("grad of x", got[0], exact[0], size[0], out_width)
        check_sum("grad of weight", got[1], exact[1], size[1], max(tokens, 1))


def test_check_would_notice_a_transposed_block() -> None:
    x, weight = torch.randn(4, 32), torch.randn(2, 16, 16)
    exact = block_product_reference(x.double(), weight.double())
    magnitude = block_product_reference(x.double().abs(), weight.double().abs())
    with pytest.raises(Mismatch):
        check_sum("transposed", block_product(x, weight.mT.contiguous()), exact, magnitude, 16)


def test_threads_give_equal_bits(isa: str) -> None:
    x, weight, grad = torch.randn(2050, 512), torch.randn(8, 64, 64), torch.randn(2050, 512)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((block_product(x, weight), *torch.ops.nogemm.block_product_backward(grad, x, weight)))
    for name, one, two in zip(("y", "grad of x", "grad of weight"), *results, strict=True):
        check_equal(name, two, one)


def test_strided_input(isa: str) -> None:
    x, weight = torch.randn(32, 9).T, torch.randn(2, 16, 5).mT
    check_equal("strided", block_product(x, weight[:, :4]), block_product(x.contiguous(), weight[:, :4].contiguous()))


def test_gradient_and_opcheck() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block_product, (x, weight))
    args = (torch.randn(3, 6, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True))
    torch.library.opcheck(torch.ops.nogemm.block_product, args)


def test_wrong_width_is_named() -> None:
    with pytest.raises(ShapeError, match=r"x \(3, 7\).*weight \(2, 4, 3\)"):
        block_product(torch.randn(3, 7), torch.randn(2, 4, 3))
