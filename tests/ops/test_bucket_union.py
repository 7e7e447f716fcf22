"""bucket_union: values on every instruction set, threads, strides, empty inputs, errors."""

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import bucket_union, bucket_union_reference
from nogemm.testing.compare import Mismatch, check_equal

Shape = tuple[int, int, int, int]
SHAPES: tuple[Shape, ...] = (
    (1, 1, 1, 1),
    (3, 2, 37, 3),
    (65, 16, 1025, 6),
    (2, 5, 4096, 9),
    (0, 2, 5, 2),
    (4, 0, 7, 2),
)


def draw(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, tables, neurons, bits = shape
    codes = torch.randint(0, 2**bits, (tokens, tables), dtype=torch.int32)
    return codes, torch.randint(0, 2**bits, (tables, neurons), dtype=torch.int32)


@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(isa: str, shape: Shape) -> None:
    codes, neurons = draw(shape)
    expected = bucket_union_reference(codes, neurons)
    got = bucket_union(codes, neurons)
    check_equal("mask", got, expected)
    check_equal("strided", bucket_union(codes.T.contiguous().T, neurons.T.contiguous().T), expected)
    if shape[0] > 1 and shape[1]:
        changed = codes.clone()
        changed[-1] = -1  # nobody's bucket
        assert not bucket_union(changed, neurons)[-1].any()
        with pytest.raises(Mismatch):
            check_equal("another token", bucket_union(changed, neurons), expected)


def test_threads_give_equal_bits_and_opcheck(isa: str) -> None:
    codes, neurons = draw((300, 8, 700, 7))
    torch.set_num_threads(1)
    one = bucket_union(codes, neurons)
    torch.set_num_threads(2)
    check_equal("threads", bucket_union(codes, neurons), one)
    torch.library.opcheck(torch.ops.nogemm.bucket_union, (codes[:3], neurons))


def test_errors_name_the_tensors() -> None:
    codes, neurons = draw((3, 2, 5, 2))
    with pytest.raises(ShapeError, match=r"codes \(3, 2\) and neurons \(5, 2\)"):
        bucket_union(codes, neurons.T)
