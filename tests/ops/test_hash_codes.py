"""hash_codes: codes, scores, neighbours and gradient, against enumeration and closed forms."""

import itertools
import math

import pytest
import torch

from nogemm.errors import ShapeError
from nogemm.ops import hash_codes
from nogemm.ops.hash_codes import hash_codes_backward_reference, hash_codes_reference, nearest_flips
from nogemm.testing.compare import Mismatch, check_equal, check_sum

SHAPES = ((1, 1), (5, 8), (17, 3), (3, 16), (64, 8), (9, 9))  # tables, bits


def enumerate_scores(z: list[float], gelu: bool) -> dict[int, float]:
    """Score every code of one table straight from the softmax of equation 5."""
    bits = len(z)
    normaliser = math.prod(math.exp(v) + math.exp(-v) for v in z)
    scores = {}
    for signs in itertools.product((-1, 1), repeat=bits):
        code = sum((s > 0) << (bits - 1 - j) for j, s in enumerate(signs))
        inner = sum(s * v for s, v in zip(signs, z, strict=True))
        scores[code] = (inner if gelu else 1.0) * math.exp(inner) / normaliser
    return scores


def test_hand_worked_convention() -> None:
    codes, scores = hash_codes(torch.tensor([[1.0, -2.0, 0.0, 3.0]]), bits=2, gelu=False)
    assert codes.tolist() == [[[2], [1]]]  # first bit is the most significant; z = 0 gives bit 0
    expected = [1 / (1 + math.exp(-2)) / (1 + math.exp(-4)), 0.5 / (1 + math.exp(-6))]
    torch.testing.assert_close(scores.flatten(), torch.tensor(expected))


@pytest.mark.parametrize("gelu", [True, False])
def test_all_neighbours_are_the_softmax(gelu: bool) -> None:
    z = torch.randn(6, 4, dtype=torch.float64)
    codes, scores = hash_codes_reference(z, 4, 16, gelu)
    for n in range(6):
        expected = enumerate_scores(z[n].tolist(), gelu)
        got = dict(zip(codes[n, 0].tolist(), scores[n, 0].tolist(), strict=True))
        assert got == pytest.approx(expected)
    total = scores.sum(-1)
    closed = (z * z.tanh()).sum(-1, keepdim=True) if gelu else torch.ones(6, 1, dtype=torch.float64)
    torch.testing.assert_close(total, closed)


@pytest.mark.parametrize("neighbours", [1, 2, 3, 4, 7, 32])
def test_neighbours_are_the_smallest_sums_in_order(neighbours: int) -> None:
    u = torch.rand(50, 1, 5, dtype=torch.float64)
    u[0] = 0.5  # ties: the smaller mask first
    masks = nearest_flips(u, neighbours)
    for n in range(50):
        values = u[n, 0].tolist()
        sums = {mask: sum(v for j, v in enumerate(values) if mask >> (4 - j) & 1) for mask in range(32)}
        best = sorted(range(32), key=lambda mask: (sums[mask], mask))[:neighbours]
        if n == 0:
            assert masks[n, 0].tolist() == best
        else:
            assert [sums[m] for m in masks[n, 0].tolist()] == pytest.approx([sums[m] for m in best])


def test_two_neighbours_make_the_function_continuous() -> None:
    below, above = (torch.tensor([[0.7, s * 1e-9, -1.3]], dtype=torch.float64) for s in (-1, 1))
    table = torch.randn(8, dtype=torch.float64)
    values = []
    for z in (below, above):
        codes, scores = hash_codes_reference(z, 3, 2, True)
        values.append((table[codes.long()] * scores).sum().item())
    assert values[0] == pytest.approx(values[1], abs=1e-7)
    one = [hash_codes_reference(z, 3, 1, True) for z in (below, above)]
    jump = [(table[c.long()] * s).sum().item() for c, s in one]
    assert abs(jump[0] - jump[1]) > 1e-3  # with one neighbour it is not


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("neighbours", [1, 2, 4])
def test_matches_float64(isa: str, neighbours: int, gelu: bool, dtype: torch.dtype) -> None:
    for tables, bits in SHAPES:
        if neighbours > 2**bits:
            continue
        for tokens in (0, 1, 5, 67):
            z = (torch.randn(tokens, tables * bits) * 1.5).to(dtype)
            codes, scores = hash_codes(z, bits, neighbours, gelu)
            exact_codes, exact = hash_codes_reference(z.double(), bits, neighbours, gelu)
            check_equal("codes", codes, exact_codes)
            # The score is a product of K sigmoids times a sum of K terms: relative error about 8 K roundings, and
            # cancellation in a_F is bounded by A itself.
            scale = z.double().reshape(tokens, tables, 1, bits).abs().sum(-1) if gelu else torch.ones_like(exact)
            flat = torch.sigmoid(2 * z.double().reshape(tokens, tables, 1, bits).abs()).prod(-1)
            check_sum("scores", scores, exact, (exact.abs() + scale * flat).expand_as(exact), 8 * bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("neighbours", [1, 2, 4])
def test_backward_matches_float64(isa: str, neighbours: int, gelu: bool, dtype: torch.dtype) -> None:
    for tables, bits in SHAPES:
        if neighbours > 2**bits:
            continue
        z = (torch.randn(41, tables * bits) * 1.5).to(dtype)
        codes, _ = hash_codes(z, bits, neighbours, gelu)
        grad = torch.randn(41, tables, neighbours).to(dtype)
        got = torch.ops.nogemm.hash_codes_backward(grad, z, codes, bits, gelu)
        exact = hash_codes_backward_reference(grad.double(), z.double(), codes, bits, gelu)
        # Every term is at most |grad| p (1 + 2 A): the same bound as for the scores, once per neighbour.
        spread = 1 + 2 * z.double().reshape(41, tables, bits).abs().sum(-1, keepdim=True)
        size = grad.double().abs().sum(-1, keepdim=True) * spread
        check_sum("grad of z", got, exact, size.expand(41, tables, bits).reshape(exact.shape), 8 * bits)


@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("neighbours", [1, 2, 3])
def test_gradient(neighbours: int, gelu: bool) -> None:
    z = torch.randn(3, 8, dtype=torch.float64)
    z = (z + 0.2 * z.sign()).requires_grad_()  # stay away from z = 0, where the function jumps
    assert torch.autograd.gradcheck(lambda v: hash_codes(v, 4, neighbours, gelu)[1], (z,))
    exact = torch.autograd.grad(hash_codes_reference(z, 4, neighbours, gelu)[1].sin().sum(), z)[0]
    small = z.detach().float().requires_grad_()
    got = torch.autograd.grad(hash_codes(small, 4, neighbours, gelu)[1].sin().sum(), small)[0]
    torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_stays_in_its_table(isa: str, bad: float) -> None:
    z = torch.randn(4, 24)
    clean_codes, clean = hash_codes(z, 8, 2)
    z[1, 10] = bad
    codes, scores = hash_codes(z, 8, 2)
    assert scores[1, 1].isnan().all()
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 256
    keep = torch.ones(4, 3, dtype=torch.bool)
    keep[1, 1] = False
    check_equal("codes of others", codes[keep], clean_codes[keep])
    check_equal("scores of others", scores[keep], clean[keep])


def test_large_z_does_not_overflow(isa: str) -> None:
    _, scores = hash_codes(torch.full((1, 8), 200.0), 8, 2)
    torch.testing.assert_close(scores[0, 0], torch.tensor([1600.0, 0.0]))


def test_check_would_notice_one_flipped_bit() -> None:
    codes, _ = hash_codes(torch.randn(5, 16), 8)
    wrong = codes.clone()
    wrong[2, 1, 0] ^= 4
    with pytest.raises(Mismatch, match="1 of 10 values"):
        check_equal("codes", wrong, codes)


def test_threads_and_batches_give_equal_bits(isa: str) -> None:
    z = torch.randn(1031, 64 * 8)
    torch.set_num_threads(1)
    one = hash_codes(z, 8, 2)
    torch.set_num_threads(2)
    for got, expected in zip(hash_codes(z, 8, 2), one, strict=True):
        check_equal("two threads", got, expected)
    for got, expected in zip(hash_codes(z[17:18], 8, 2), one, strict=True):
        check_equal("batch of one", got, expected[17:18])


def test_strides(isa: str) -> None:
    z = torch.randn(16, 7).T
    for got, expected in zip(hash_codes(z, 4), hash_codes(z.contiguous(), 4), strict=True):
        check_equal("strided", got, expected)


def test_opcheck_and_aot_dispatch() -> None:
    args = (torch.randn(3, 16, requires_grad=True), 8, 2, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.nogemm.hash_codes, args, test_utils=checks)
    # opcheck's own AOT test adds a float to the integer output in place and stops there; the same check by hand:
    z = torch.randn(5, 16, requires_grad=True)
    compiled = torch.compile(lambda v: hash_codes(v, 8, 2), backend="aot_eager", dynamic=True, fullgraph=True)
    results = []
    for function in (lambda v: hash_codes(v, 8, 2), compiled):
        codes, scores = function(z)
        results.append((codes, scores, *torch.autograd.grad(scores.sin().sum(), z)))
    for name, got, expected in zip(("codes", "scores", "gradient"), results[1], results[0], strict=True):
        check_equal(name, got.detach(), expected.detach())


def test_wrong_width_is_named() -> None:
    with pytest.raises(ShapeError, match=r"K = 8 bits, got \(2, 12\)"):
        hash_codes(torch.randn(2, 12), 8)
