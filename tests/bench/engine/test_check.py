"""Wrong outputs must be refused, however few of their numbers are wrong."""

from __future__ import annotations

import pytest
import torch

from nogemm.bench.engine.check import DENSE_BOUNDS, Bound, compare, some_rows, token_errors

REFERENCE = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


def test_equal_output_passes_every_bound() -> None:
    for bound in DENSE_BOUNDS.values():
        assert compare(REFERENCE.clone(), REFERENCE, bound) == {"verified": True, "max_error": 0.0, "rms_error": 0.0}


def test_errors_by_hand() -> None:
    reference = torch.tensor([[3.0, 4.0], [0.0, 5.0]])  # both tokens have norm 5
    output = reference + torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    assert token_errors(output, reference).tolist() == pytest.approx([0.1, 0.0])
    found = compare(output, reference, Bound(rms=1.0, token=1.0))
    assert found["rms_error"] == pytest.approx(0.1 / 2**0.5)
    assert found["max_error"] == pytest.approx(0.1)


@pytest.mark.parametrize("precision", list(DENSE_BOUNDS))
def test_wrong_outputs_are_refused(precision: str) -> None:
    one_row = REFERENCE.clone()
    one_row[17] = REFERENCE[18]
    not_finite = REFERENCE.clone()
    not_finite[3, 3] = torch.nan
    wrong = [torch.zeros_like(REFERENCE), REFERENCE.roll(1, 0), -REFERENCE, one_row, not_finite, REFERENCE[:-1]]
    for output in wrong:
        found = compare(output, REFERENCE, DENSE_BOUNDS[precision])
        assert found["verified"] is False
        assert found["error"].startswith("does not match the reference")


def test_one_token_at_a_boundary_is_allowed_two_are_not() -> None:
    bound = Bound(rms=0.5, token=1e-3, share=1e-3, outlier=1.0)
    output = REFERENCE.clone()
    output[5] += 0.05
    assert compare(output, REFERENCE, bound)["verified"] is True
    output[6] += 0.05
    assert "2 of 64 tokens" in compare(output, REFERENCE, bound)["error"]
    output = REFERENCE.clone()
    output[5] *= -1
    assert "a token differs by" in compare(output, REFERENCE, bound)["error"]


def test_checked_rows_include_first_and_last() -> None:
    assert some_rows(3).tolist() == [0, 1, 2]
    rows = some_rows(32768)
    assert (len(rows), int(rows[0]), int(rows[-1])) == (256, 0, 32767)


def test_a_reference_of_zeros_is_compared_absolutely_and_nan_is_never_verified() -> None:
    zeros = torch.zeros(4, 3)
    assert compare(zeros, zeros, Bound(rms=1e-4, token=1e-3))["verified"]
    assert not compare(zeros + 1e-2, zeros, Bound(rms=1e-4, token=1e-3))["verified"]
    assert not compare(zeros, zeros + float("nan"), Bound(rms=1e-4, token=1e-3))["verified"]
