"""Hold a model or layer that was saved, loaded or rebuilt against the one it came from.

What is stored is ours, so it is compared bit by bit. What torch multiplies is not: equal weights at other addresses, or
another number of threads, may be summed in another order by its BLAS. Such answers are held to a bound that is measured
on the same inputs in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from nogemm.testing.compare import Closeness, Mismatch, check_equal, unit_roundoff


def answer_to(x: Tensor) -> Callable[[nn.Module], Tensor]:
    """Return what runs a module on `x`, cast to the module's own dtype."""

    def run(module: nn.Module) -> Tensor:
        dtypes = [tensor.dtype for tensor in (*module.parameters(), *module.buffers())]
        return module(x.to(next((dtype for dtype in dtypes if dtype.is_floating_point), x.dtype)))

    return run


def check_same_tensors(name: str, actual: nn.Module, expected: nn.Module) -> None:
    """Demand the same names, dtypes and bits in both state dicts.

    Raises:
        Mismatch: it names the first tensor that differs.
    """
    left, right = actual.state_dict(), expected.state_dict()
    if left.keys() != right.keys():
        raise Mismatch(f"{name}: only one of the two has {sorted(left.keys() ^ right.keys())}")
    for key, value in left.items():
        check_equal(f"{name}: {key}", value, right[key])


def check_answers(
    name: str, actual: Tensor, module: nn.Module, run: Callable[[nn.Module], Tensor], *, slack: float = 16.0
) -> Closeness:
    """Compare an answer with that of `module` up to the order in which sums of float32 products are added.

        |actual - y| <= slack (max |y - y64| + u max |y64|)        y = run(module), y64 = run(module in float64)

    y itself is off by the roundings on the way through the module; another order of the same sums is off by as much,
    not by more. A bit of a code that lies within rounding of zero may flip (one of a million): inputs are seeded.

    Args:
        actual: the answer of another copy, float32.
        module: float32; it is copied for the float64 reference.
        run: maps a module to its answer; floating inputs must be cast to the module's dtype.
    Raises:
        Mismatch: beyond the bound, or of another shape or dtype.
    """
    actual = actual.detach()
    with torch.no_grad():
        y = run(module)
        exact = run(copy.deepcopy(module).double())
    if actual.shape != y.shape or actual.dtype != y.dtype:
        raise Mismatch(f"{name}: {actual.dtype} {tuple(actual.shape)}, expected {y.dtype} {tuple(y.shape)}")
    if y.numel() == 0:
        return Closeness(0.0, 0.0)
    bound = slack * float((y.double() - exact).abs().max() + unit_roundoff(torch.float32) * exact.abs().max())
    error = float((actual.double() - y.double()).abs().max())
    if not error <= bound:
        raise Mismatch(f"{name}: off by {error:.3g}, allowed {bound:.3g}")
    return Closeness(error, error / bound if bound else 0.0)


def check_same_model(
    name: str, actual: nn.Module, expected: nn.Module, run: Callable[[nn.Module], Tensor]
) -> Closeness:
    """Compare a copy with its origin: equal bits of every stored tensor, then answers by `check_answers`.

    Modules in 16 bits answer as float32 copies of themselves: there the bound would be as wide as a flipped code.

    Raises:
        Mismatch: see `check_same_tensors` and `check_answers`.
    """
    check_same_tensors(name, actual, expected)
    narrow = (torch.float16, torch.bfloat16)
    if any(tensor.dtype in narrow for tensor in (*expected.parameters(), *expected.buffers())):
        actual, expected = copy.deepcopy(actual).float(), copy.deepcopy(expected).float()
    with torch.no_grad():
        answer = run(actual)
    return check_answers(name, answer, expected, run)
