"""The cosine transform: its matrix, its inverse, its backward, odd widths, dtypes, bad input."""

import math

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import dct
from nogemm.testing.compare import Mismatch, check_sum

WIDTHS = (1, 2, 3, 4, 5, 8, 17, 64, 512)


def cosine_matrix(width: int) -> torch.Tensor:
    """Write the DCT-II out from its definition, rows are outputs."""
    n = torch.arange(width, dtype=torch.float64)
    matrix = torch.cos(math.pi * (2 * n + 1) * n.unsqueeze(1) / (2 * width)) * math.sqrt(2 / width)
    matrix[0] *= math.sqrt(0.5)
    return matrix


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("inverse", [False, True])
def test_matches_the_written_out_matrix(width: int, inverse: bool) -> None:
    matrix = cosine_matrix(width) if not inverse else cosine_matrix(width).T
    x = torch.randn(7, width, dtype=torch.float64)
    torch.testing.assert_close(dct(x, inverse), x @ matrix.T, rtol=1e-12, atol=1e-12)
    y = dct(x.float(), inverse)
    check_sum("float32", y, x.float().double() @ matrix.T, x.float().double().abs() @ matrix.abs().T, width)
    with pytest.raises(Mismatch):
        check_sum("wrong", y + 1e-3, x.float().double() @ matrix.T, x.double().abs() @ matrix.abs().T, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_forward_and_inverse_undo_each_other(width: int) -> None:
    x = torch.randn(2, 3, width, dtype=torch.float64)
    torch.testing.assert_close(dct(dct(x), inverse=True), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradient_and_registration(inverse: bool) -> None:
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: dct(v, inverse), (x,))
    torch.library.opcheck(torch.ops.nogemm.dct, (torch.randn(3, 8, requires_grad=True), inverse))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_strides_and_empty(dtype: torch.dtype) -> None:
    x = torch.randn(8, 5).to(dtype).T
    y = dct(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ cosine_matrix(8).T, rtol=2e-2, atol=2e-2)
    assert dct(torch.randn(0, 8).to(dtype)).shape == (0, 8)


def test_a_row_with_nan_stays_alone() -> None:
    x = torch.randn(3, 16)
    clean = dct(x)
    x[1, 4] = float("nan")
    y = dct(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], clean[[0, 2]])


def test_a_missing_dimension_is_named() -> None:
    with pytest.raises(ShapeError, match="last dimension"):
        dct(torch.tensor(1.0))
