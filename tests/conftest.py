"""Fixtures shared by all tests: the instruction set in force and the number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nogemm import ops


@pytest.fixture(params=ops.supported_isas() or ("reference",))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once under every instruction set that was built and that this machine has."""
    before = ops.isa()
    if request.param != "reference":
        ops.set_isa(request.param)
    yield request.param
    if before != "reference":
        ops.set_isa(before)


@pytest.fixture(autouse=True)
def _same_state_for_every_test() -> Iterator[None]:
    """Start from one seed, and undo what a test does to the number of threads."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
