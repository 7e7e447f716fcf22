"""The head's ops on every instruction set, for any shape, dtype, state and quality of codes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nogemm.errors import ConfigError, ShapeError
from nogemm.heads.codes import make_codes, second_moment
from nogemm.ops import (
    head_argmax,
    head_argmax_reference,
    head_logits,
    head_logits_reference,
    head_search,
    head_search_reference,
)
from nogemm.ops.head_scan import HeadCodes, head_estimates_reference
from nogemm.ops.packed_hire import lay_out_sketch, read_sketch
from nogemm.testing.compare import Mismatch, check_equal

SHAPES = ((1, 1), (2, 3), (63, 8), (64, 65), (65, 64), (200, 72), (1000, 100), (4133, 200))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(rows: int, width: int, dtype: torch.dtype, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return states of few directions, a head, and its bias."""
    mix = torch.randn(width, width) * torch.logspace(0, -2, width)
    return torch.randn(tokens, width) @ mix.T, torch.randn(rows, width).to(dtype), torch.randn(rows)


def lowest_argmax(logits: Tensor) -> Tensor:
    return (logits == logits.amax(1, keepdim=True)).int().argmax(1)


def bounds(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """How far a logit in float32 may be from its value: the rounding of D products and sums."""
    size = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    return (x.shape[1] + 2) * 2.0**-24 * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_it_is_the_argmax_of_the_logits(isa: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight, bias = draw(rows, width, dtype)
    exact = x.double() @ weight.double().T
    for own in (None, bias):
        logits = head_logits(x, weight, own)
        off = (logits.double() - exact - (0 if own is None else own.double())).abs()
        assert bool((off <= bounds(x, weight, own)).all())
        for moment in (None, second_moment(x)):
            codes = make_codes(weight, own, moment, leading=15)
            index, value, count = head_argmax(x, weight, own, codes)
            check_equal("index", index, lowest_argmax(logits))
            check_equal("value", value, logits.amax(1))
            assert bool((count >= 1).all())
            assert bool((count <= rows).all())
            theirs, _, kept = head_argmax_reference(x, weight, own, None, *codes.tensors(), 1.0)
            margin = logits.topk(min(2, rows), 1).values
            sure = margin[:, 0] - margin[:, -1] > 2 * bounds(x, weight, own).amax(1) if rows > 1 else theirs == index
            check_equal("reference", index[sure], theirs[sure])
            assert bool((kept >= 1).all())


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 17, 40])
def test_a_token_does_not_depend_on_the_others_nor_on_threads(isa: str, tokens: int) -> None:
    x, weight, bias = draw(1000, 72, torch.bfloat16, tokens)
    codes = make_codes(weight, bias, second_moment(x))
    torch.set_num_threads(1)
    alone = [head_argmax(row.unsqueeze(0), weight, bias, codes) for row in x]
    torch.set_num_threads(2)
    for place, got in enumerate(head_argmax(x, weight, bias, codes)):
        check_equal(f"result {place}", got, torch.cat([one[place] for one in alone]))
    logits = head_logits(x, weight, bias)
    check_equal("logits", logits, torch.cat([head_logits(row.unsqueeze(0), weight, bias) for row in x]))


def test_codes_that_fit_leave_few_rows_and_others_more_but_never_another_answer(isa: str) -> None:
    x, weight, _ = draw(4133, 200, torch.bfloat16, 16)
    expected = lowest_argmax(head_logits(x, weight))
    left = {}
    for name, moment in (("fitting", second_moment(x)), ("none", None), ("wrong", second_moment(x.flip(1)))):
        index, _, count = head_argmax(x, weight, None, make_codes(weight, None, moment))
        check_equal(name, index, expected)
        left[name] = float(count.double().mean())
    assert left["fitting"] < 200
    assert left["fitting"] < left["none"] < left["wrong"]


def test_a_state_along_a_rows_own_rounding_is_answered_rightly(isa: str) -> None:
    """The worst state for a row: all that rounding took off it counts."""
    _, weight, _ = draw(300, 48, torch.float32)
    codes = make_codes(weight, leading=8)
    scale8, scale4, *_ = codes.numbers.double().permute(1, 0, 2).flatten(1)[:, :300]
    rows = torch.cat((read_sketch(codes.eight, False)[:300] * scale8[:, None], read_sketch(codes.four, True)[:300]), 1)
    rows[:, 8:] *= scale4[:, None]
    project = codes.project.double()
    lost = (weight.double() - codes.mean.double()) @ torch.linalg.inv(project) - rows
    x = (lost @ torch.linalg.inv(project).T).float()
    x = torch.cat((x, x + weight.mean(0), x + 0.05 * weight))
    index, _, _ = head_argmax(x, weight, None, codes)
    check_equal("index", index, lowest_argmax(head_logits(x, weight)))


def test_ties_go_to_the_lowest_index(isa: str) -> None:
    x, weight, _ = draw(500, 64, torch.bfloat16, 8)
    weight = weight[torch.arange(500) % 7]
    index, value, _ = head_argmax(x, weight, None, make_codes(weight))
    check_equal("ties", index, head_logits(x, weight)[:, :7].argmax(1))
    assert int(index.max()) < 7
    same = torch.ones(130, 64)
    index, value, _count = head_argmax(x, same, None, make_codes(same))
    check_equal("all equal", index, torch.zeros(8, dtype=torch.int64))
    check_equal("value", value, head_logits(x, same)[:, 0])
    zero, _, _ = head_argmax(torch.zeros(1, 64), weight, None, make_codes(weight))
    assert int(zero) == 0
    negative, _, _ = head_argmax(x, weight, torch.full((500,), -1e4), make_codes(weight, torch.full((500,), -1e4)))
    check_equal("all negative", negative, lowest_argmax(head_logits(x, weight, torch.full((500,), -1e4))))


def test_states_that_are_not_finite_have_no_answer(isa: str) -> None:
    x, weight, _ = draw(200, 24, torch.float32, 6)
    codes = make_codes(weight)
    expected = head_argmax(x, weight, None, codes)[0]
    broken = x.clone()
    broken[1, 3], broken[3, 0] = torch.nan, torch.inf
    for function in (
        lambda: head_argmax(broken, weight, None, codes),
        lambda: head_argmax_reference(broken, weight, None, None, *codes.tensors(), 1.0),
    ):
        index, value, count = function()
        assert index[[1, 3]].tolist() == [-1, -1]
        assert bool(value[[1, 3]].isnan().all())
        assert count[[1, 3]].tolist() == [0, 0]
        check_equal("others", index[[0, 2, 4]], expected[[0, 2, 4]])
    empty = head_argmax(x[:0], weight, None, codes)
    assert [part.shape[0] for part in empty] == [0, 0, 0]
    assert head_logits(x[:0], weight).shape == (0, 200)


@pytest.mark.parametrize("size", [1e10, 1e19, 1e20, 1e30, 3e38])
def test_numbers_whose_bounds_overflow_are_answered_by_all_rows(isa: str, size: float) -> None:
    x, weight, _ = draw(200, 24, torch.float32, 4)
    large = (weight / weight.abs().max() * size).clamp(-3e38, 3e38)
    codes = make_codes(large)
    logits = head_logits(x, large)
    index, _, _ = head_argmax(x, large, None, codes)
    whole = ~logits.isnan().any(1)
    check_equal("large rows", index[whole], lowest_argmax(logits)[whole])
    assert bool((index[~whole] == -1).all())
    index, _, _ = head_argmax(x * size / 10, weight, None, make_codes(weight))
    logits = head_logits(x * size / 10, weight)
    whole = ~logits.isnan().any(1) & (x * size / 10).isfinite().all(1)
    check_equal("large states", index[whole], lowest_argmax(logits)[whole])
    assert bool((index[~whole] == -1).all())


def test_a_bound_of_nothing_gives_wrong_answers(isa: str) -> None:
    """The comparisons above can fail: codes of other rows, or no bound, do not give the argmax."""
    x, weight, _ = draw(4000, 100, torch.float32, 256)
    expected = lowest_argmax(head_logits(x, weight))
    codes = make_codes(weight, leading=4)
    with pytest.raises(Mismatch):
        check_equal("no bound", head_argmax(x, weight, None, codes, share=0.0)[0], expected)
    with pytest.raises(Mismatch):
        check_equal("others' codes", head_argmax(x, weight, None, make_codes(weight.flip(0)))[0], expected)
    few, many = (head_argmax(x, weight, None, codes, share=share)[2].sum() for share in (0.2, 1.0))
    assert int(few) < int(many)


@pytest.mark.parametrize("nibbles", [False, True])
@pytest.mark.parametrize("columns", [0, 1, 8, 13])
def test_codes_are_read_back(nibbles: bool, columns: int) -> None:
    codes = torch.randint(-8, 8, (128, columns)).to(torch.int8)
    check_equal("codes", read_sketch(lay_out_sketch(codes, nibbles), nibbles)[:, :columns], codes.double())


def test_float16_states_references_and_opcheck(isa: str) -> None:
    x, weight, bias = draw(130, 40, torch.bfloat16, 3)
    codes = make_codes(weight, bias)
    half = x.to(torch.float16)
    check_equal("half", head_argmax(half, weight, bias, codes)[0], head_argmax(half.float(), weight, bias, codes)[0])
    torch.library.opcheck(torch.ops.nogemm.head_argmax, (x, weight, bias, None, *codes.tensors(), 1.0))
    torch.library.opcheck(torch.ops.nogemm.head_logits, (x, weight, None))
    close = (head_logits(x, weight, bias).double() - head_logits_reference(x, weight, bias).double()).abs()
    assert bool((close <= 2 * bounds(x, weight, bias)).all())


def test_errors_name_the_shapes() -> None:
    x, weight, bias = draw(130, 40, torch.float32, 3)
    codes = make_codes(weight)
    with pytest.raises(ShapeError, match=r"head_argmax: .* x \(3, 39\) and weight \(130, 40\)"):
        head_argmax(x[:, :39], weight, None, codes)
    with pytest.raises(ConfigError, match="share must be from 0 to 1, got 2"):
        head_argmax(x, weight, None, codes, share=2)
    with pytest.raises(ConfigError, match="not finite"):
        make_codes(weight.index_fill(0, torch.tensor([3]), torch.inf))
    with pytest.raises(ConfigError, match="not finite"):
        make_codes(weight, bias.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(ConfigError, match=r"moment must be \[40, 40\], got \(39, 39\)"):
        make_codes(weight, None, torch.eye(39))
    with pytest.raises(ConfigError, match="no state of these texts is finite"):
        second_moment(torch.full((3, 4), torch.nan))


@pytest.mark.parametrize("field", ["project", "mean", "eight", "four", "rest", "numbers", "limits"])
def test_codes_of_another_head_are_refused(isa: str, field: str) -> None:
    x, weight, _ = draw(130, 40, torch.float32, 3)
    codes, other = make_codes(weight, leading=8, sketch=16), make_codes(torch.randn(200, 48), leading=12, sketch=28)
    mixed: HeadCodes = replace(codes, **{field: getattr(other, field)[:5]})
    if isa == "reference":
        pytest.skip("the native kernel alone checks")
    with pytest.raises(ValueError, match="head_argmax"):
        head_argmax(x, weight, None, mixed)
    with pytest.raises(ValueError, match="head_search"):
        head_search(x, weight, None, mixed, 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_noise_counts_as_the_logits_do(isa: str, rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight, bias = draw(rows, width, dtype)
    noise = -torch.empty(len(x), rows).exponential_().log() * 10
    codes = make_codes(weight, bias, second_moment(x), leading=8, sketch=24)
    logits = head_logits(x, weight, bias) + noise
    index, value, count = head_argmax(x, weight, bias, codes, noise_NV=noise)
    check_equal("index", index, lowest_argmax(logits))
    check_equal("value", value, logits.amax(1))
    assert bool((count >= 1).all())
    theirs = head_argmax_reference(x, weight, bias, noise, *codes.tensors(), 1.0)[0]
    if rows > 1:
        margin = logits.topk(2, 1).values
        size = 2 * bounds(x, weight, bias).amax(1) + 2.0**-22 * noise.abs().amax(1)
        sure = margin[:, 0] - margin[:, 1] > size
        check_equal("reference", index[sure], theirs[sure])
    broken = noise.clone()
    broken[1, 0] = torch.nan
    assert head_argmax(x, weight, bias, codes, noise_NV=broken)[0][1] == -1
    with pytest.raises(ShapeError, match="noise must be"):
        head_argmax(x, weight, bias, codes, noise_NV=noise[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_search_gives_exact_logits_of_some_rows_and_estimates_of_all(
    isa: str, rows: int, width: int, dtype: torch.dtype
) -> None:
    x, weight, bias = draw(rows, width, dtype)
    codes = make_codes(weight, bias, second_moment(x), leading=8, sketch=24)
    exact = head_logits(x, weight, bias)
    for noise in (None, torch.randn(len(x), rows)):
        sums = exact if noise is None else exact + noise
        index, value, all_logits = head_search(x, weight, bias, codes, 40, noise_NV=noise, logits=True)
        bound = head_estimates_reference(x, bias, noise, codes, rows, width)
        computed = all_logits == sums
        assert bool((computed.sum(1) >= min(40, rows)).all())
        check_equal("value", value, sums.gather(1, index.unsqueeze(1)).squeeze(1))
        check_equal("best of those", value, sums.masked_fill(~computed, -torch.inf).amax(1))
        blur = 2 * bounds(x, weight, bias) + 0.02 * bound[1] + 1e-4 * bound[0].abs().amax(1, keepdim=True)
        assert bool(((all_logits.double() - sums.double()).abs() <= bound[1] + blur).all())
        assert bool((computed | ((all_logits.double() - bound[0]).abs() <= blur + 0.1 * bound[1])).all())
        least = bound[0].topk(min(40, rows), 1).values[:, -1:]
        assert bool((computed | (bound[0] <= least + 2 * (blur + 0.1 * bound[1]))).all()), "a best row was left out"
        few = head_search(x, weight, bias, codes, 40, noise_NV=noise)
        assert few[2].shape == (len(x), 0)
        check_equal("value of few", few[1], sums.gather(1, few[0].unsqueeze(1)).squeeze(1))
        every = head_search(x, weight, bias, codes, rows, noise_NV=noise)
        check_equal("all rows", every[0], lowest_argmax(sums))


def test_a_search_finds_most_of_the_largest_logits_and_more_with_more_rows(isa: str) -> None:
    x, weight, _ = draw(4133, 200, torch.bfloat16, 64)
    codes = make_codes(weight, None, second_moment(x))
    expected = lowest_argmax(head_logits(x, weight))
    share = {
        rows: float((head_search(x, weight, None, codes, rows)[0] == expected).double().mean()) for rows in (16, 512)
    }
    assert share[512] >= 0.95
    assert share[16] <= share[512]
    blind = make_codes(weight, None, second_moment(x), leading=4, sketch=4)
    assert float((head_search(x, weight, None, blind, 16)[0] == expected).double().mean()) < share[16]
    reference = head_search_reference(x, weight, None, None, *codes.tensors(), 512, False)[0]
    assert float((reference == expected).double().mean()) >= 0.95


@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_a_search_does_not_depend_on_other_states_nor_on_threads(isa: str, tokens: int) -> None:
    x, weight, bias = draw(1000, 72, torch.bfloat16, tokens)
    codes = make_codes(weight, bias, second_moment(x))
    noise = torch.randn(tokens, 1000)
    torch.set_num_threads(1)
    alone = [
        head_search(x[n : n + 1], weight, bias, codes, 50, noise_NV=noise[n : n + 1], logits=True)
        for n in range(tokens)
    ]
    torch.set_num_threads(2)
    together = head_search(x, weight, bias, codes, 50, noise_NV=noise, logits=True)
    for place, got in enumerate(together):
        check_equal(f"result {place}", got, torch.cat([one[place] for one in alone]))


def test_a_search_of_equal_broken_and_overflowing_logits(isa: str) -> None:
    x, weight, _ = draw(500, 64, torch.float32, 6)
    same = torch.ones(700, 64)
    assert head_search(x, same, None, make_codes(same), 3)[0].tolist() == [0] * 6
    broken = x.clone()
    broken[1, 3], broken[3, 0] = torch.nan, torch.inf
    index, value, logits = head_search(broken, weight, None, make_codes(weight), 500, logits=True)
    whole = torch.tensor([0, 2, 4, 5])
    assert index[[1, 3]].tolist() == [-1, -1]
    assert bool(value[[1, 3]].isnan().all())
    assert bool(logits[[1, 3]].isnan().all())
    check_equal("others", index[whole], lowest_argmax(head_logits(x, weight))[whole])
    large = weight * 1e36
    index, _, logits = head_search(x, large, None, make_codes(large), 20, logits=True)
    check_equal("large", index, lowest_argmax(head_logits(x, large)))
    check_equal("large logits", logits, head_logits(x, large))
    assert head_search(x[:0], weight, None, make_codes(weight), 5, logits=True)[2].shape == (0, 500)
    with pytest.raises(ConfigError, match="rows must be"):
        head_search(x, weight, None, make_codes(weight), 0)
    torch.library.opcheck(
        torch.ops.nogemm.head_search, (x, weight, None, None, *make_codes(weight).tensors(), 20, False)
    )
