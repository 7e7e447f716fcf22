"""gather_accumulate: values, both gradients, every row dtype, index range, determinism."""

import pytest
import torch

from nogemm.errors import DtypeError, ShapeError
from nogemm.ops import gather_accumulate
from nogemm.ops.gather_accumulate import gather_accumulate_backward_reference, gather_accumulate_reference
from nogemm.testing.compare import Mismatch, check_equal, check_sum

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = (
    (1, 2, 1, 1),
    (16, 8, 1, 64),
    (5, 32, 2, 37),
    (3, 1024, 4, 130),
    (64, 256, 1, 384),
)  # tables, rows, F, width


def draw(tokens: int, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tables, rows, neighbours, width = shape
    codes = torch.randint(0, rows, (tokens, tables, neighbours), dtype=torch.int32)
    return codes, torch.randn(tokens, tables, neighbours), torch.randn(tables, rows, width)


def test_hand_worked() -> None:
    codes = torch.tensor([[[1, 0], [2, 2]]], dtype=torch.int32)
    scores = torch.tensor([[[2.0, 1.0], [0.5, 0.5]]])
    tables = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], [[9.0, 9.0], [9.0, 9.0], [4.0, 8.0]]])
    assert gather_accumulate(codes, scores, tables).tolist() == [[5.0, 10.0]]


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_float64(isa: str, shape: Shape, dtype: torch.dtype, row_dtype: torch.dtype) -> None:
    for tokens in (0, 1, 3, 65):
        codes, scores, tables = draw(tokens, shape)
        scores = scores.to(dtype)
        rows = (tables * 40).clamp(-127, 127).to(row_dtype) if row_dtype == torch.int8 else tables.to(row_dtype)
        scale = torch.rand(shape[:2]) if row_dtype == torch.int8 else None
        wide = rows.double() if scale is None else rows.double() * scale.double().unsqueeze(-1)
        exact = gather_accumulate_reference(codes, scores.double(), wide)
        magnitude = gather_accumulate_reference(codes, scores.double().abs(), wide.abs())
        got = gather_accumulate(codes, scores, rows, scale)
        check_sum("gather", got, exact, magnitude, shape[0] * shape[2] + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES[:-1], (20, 256, 1, 384)])
def test_backward_matches_float64(isa: str, shape: Shape, dtype: torch.dtype) -> None:
    for tokens in (0, 1, 131):
        codes, scores, tables = draw(tokens, shape)
        scores, tables = scores.to(dtype), tables.to(dtype)
        grad = torch.randn(tokens, shape[3]).to(dtype)
        got = torch.ops.nogemm.gather_accumulate_backward(grad, codes, scores, tables)
        wide = (scores.double(), tables.double())
        exact = gather_accumulate_backward_reference(grad.double(), codes, *wide)
        size = gather_accumulate_backward_reference(grad.double().abs(), codes, *(t.abs() for t in wide))
        check_sum("grad of scores", got[0], exact[0], size[0], shape[3])
        check_sum("grad of tables", got[1], exact[1], size[1], max(tokens, 1) * shape[2])


def test_check_would_notice_a_row_off_by_one() -> None:
    codes, scores, tables = draw(9, (4, 8, 1, 16))
    exact = gather_accumulate_reference(codes, scores.double(), tables.double())
    magnitude = gather_accumulate_reference(codes, scores.double().abs(), tables.double().abs())
    wrong = codes.clone()
    wrong[3, 2] = (wrong[3, 2] + 1) % 8
    with pytest.raises(Mismatch):
        check_sum("off by one", gather_accumulate(wrong, scores, tables), exact, magnitude, 4)


def test_whole_numbers_are_exact(isa: str) -> None:
    codes, scores, tables = draw(33, (7, 16, 2, 45))
    scores, tables = scores.round(), (tables * 4).round()
    exact = gather_accumulate_reference(codes, scores.double(), tables.double())
    check_equal("gather", gather_accumulate(codes, scores, tables), exact.float())


def test_threads_give_equal_bits(isa: str) -> None:
    codes, scores, tables = draw(1500, (24, 64, 2, 200))
    grad = torch.randn(1500, 200)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        backward = torch.ops.nogemm.gather_accumulate_backward(grad, codes, scores, tables)
        results.append((gather_accumulate(codes, scores, tables), *backward))
    for name, one, two in zip(("y", "grad of scores", "grad of tables"), *results, strict=True):
        check_equal(name, two, one)


def test_rows_never_read_get_no_gradient(isa: str) -> None:
    codes, scores, tables = draw(10, (3, 32, 1, 8))
    codes %= 5
    grad = torch.ops.nogemm.gather_accumulate_backward(torch.randn(10, 8), codes, scores, tables)[1]
    assert not grad[:, 5:].any()
    assert grad[:, :5].any()


@pytest.mark.parametrize("bad", [-1, 8, 2**31 - 1])
def test_codes_out_of_range_are_refused(isa: str, bad: int) -> None:
    codes, scores, tables = draw(4, (3, 8, 1, 5))
    codes[2, 1, 0] = bad
    with pytest.raises((IndexError, RuntimeError), match=r"(?i)code|index"):
        gather_accumulate(codes, scores, tables)


def test_nan_stays_in_its_row(isa: str) -> None:
    codes, scores, tables = draw(5, (3, 8, 1, 20))
    clean = gather_accumulate(codes, scores, tables)
    scores[2, 1, 0] = float("nan")
    got = gather_accumulate(codes, scores, tables)
    assert got[2].isnan().all()
    check_equal("others", got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_gradient_opcheck_and_strides(isa: str) -> None:
    codes, scores, tables = draw(6, (3, 4, 2, 5))
    wide = [t.double().requires_grad_() for t in (scores, tables)]
    assert torch.autograd.gradcheck(lambda s, t: gather_accumulate(codes, s, t), tuple(wide))
    args = (codes, scores.requires_grad_(), tables.requires_grad_(), None)
    torch.library.opcheck(torch.ops.nogemm.gather_accumulate, args)
    swapped = scores.detach().transpose(0, 2).contiguous().transpose(0, 2)
    check_equal("strided", gather_accumulate(codes, swapped, tables), gather_accumulate(codes, scores, tables))


def test_errors_name_the_tensors() -> None:
    codes, scores, tables = draw(2, (3, 4, 1, 5))
    with pytest.raises(ShapeError, match=r"scores \(2, 3\)"):
        gather_accumulate(codes, scores[..., 0], tables)
    with pytest.raises(DtypeError, match="need row_scale"):
        gather_accumulate(codes, scores, tables.to(torch.int8))
    with pytest.raises(DtypeError, match="decompress"):
        gather_accumulate(codes, scores.requires_grad_(), tables.to(torch.int8), torch.ones(3, 4)).sum().backward()
