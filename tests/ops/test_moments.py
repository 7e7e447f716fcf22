"""moment_rows: mean and variance of all of a matrix's values, without computing them."""

from __future__ import annotations

import pytest
import torch

from nogemm.ops.packed_hire import moment_rows


@pytest.mark.parametrize(("d", "f"), [(1, 1), (3, 50), (40, 7), (64, 300)])
def test_mean_and_variance_are_those_of_the_values(d: int, f: int) -> None:
    weight, bias = torch.randn(f, d), torch.randn(f)
    rows = moment_rows(weight, bias)
    assert rows.shape == (d + 2, d + 1)
    assert torch.equal(rows[1:].triu(), rows[1:]), "a triangle: kernels leave out what lies left of it"
    for x in torch.randn(5, d).double():
        values = weight.double() @ x + bias.double()
        found = rows.double() @ torch.cat((x, torch.ones(1, dtype=torch.double)))
        size = float(values.square().mean().sqrt())
        # Each number of the rows is rounded to float32, of D + 1 terms: a few units in the last place of their size.
        close = 4 * (d + 1) * torch.finfo(torch.float32).eps * (size + float(x.norm()) * float(weight.abs().max()) + 1)
        assert abs(float(found[0] - values.mean())) <= close
        assert abs(float(found[1:].norm()) - float(values.std(correction=0))) <= close
        assert abs(float(found[1:].norm()) * 1.01 - float(values.std(correction=0))) > close or f == 1


def test_without_a_bias_nothing_is_singular() -> None:
    rows = moment_rows(torch.zeros(5, 3), torch.zeros(5))
    assert bool(rows.isfinite().all())
    assert float(rows.abs().max()) < 1e-6
