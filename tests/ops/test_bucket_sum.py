"""Bucket sums: values, gradient, instruction sets, threads, empty and odd shapes, bad input."""

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import bucket_sum, bucket_sum_reference
from nogemm.testing.compare import Mismatch, check_equal, check_sum

SHAPES = [(1, 1, 1, 1), (7, 3, 4, 5), (300, 5, 16, 33), (64, 9, 2, 64), (0, 3, 4, 5)]


def case(items: int, tables: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    codes = torch.randint(0, rows, (items, tables), dtype=torch.int32)
    return torch.randn(items, width), codes, rows


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(isa: str, shape: tuple[int, int, int, int]) -> None:
    values, codes, rows = case(*shape)
    exact = bucket_sum_reference(values.double(), codes, rows)
    magnitude = bucket_sum_reference(values.double().abs(), codes, rows)
    check_sum("sums", bucket_sum(values, codes, rows), exact, magnitude, max(shape[0], 1))
    if values.numel():
        with pytest.raises(Mismatch):
            check_sum("moved", bucket_sum(values + 1.0, codes, rows), exact, magnitude, shape[0])


def test_whole_numbers_are_exact_for_any_number_of_threads(isa: str) -> None:
    values, codes, rows = case(500, 7, 8, 20)
    values = values.mul(8).round()
    torch.set_num_threads(1)
    one = bucket_sum(values, codes, rows)
    torch.set_num_threads(2)
    check_equal("two threads", bucket_sum(values, codes, rows), one)
    check_equal("reference", bucket_sum_reference(values, codes, rows), one)


def test_gradient_and_registration() -> None:
    values, codes, rows = case(6, 3, 4, 2)
    wide = values.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: bucket_sum(v, codes, rows), (wide,))
    torch.library.opcheck(torch.ops.nogemm.bucket_sum, (values.requires_grad_(), codes, rows))


def test_bad_input_is_named() -> None:
    values, codes, rows = case(6, 3, 4, 2)
    with pytest.raises(ShapeError, match=r"values \(5, 2\), codes \(6, 3\), rows 4"):
        bucket_sum(values[:5], codes, rows)
    with pytest.raises(ShapeError, match="rows 0"):
        bucket_sum(values, codes, 0)
