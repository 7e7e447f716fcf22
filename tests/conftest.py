"""Fixtures shared by all tests: the instruction set in force and the number of threads."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from nogemm import ops
from nogemm.bench import peers
from nogemm.bench.engine.measure import trial_runs
from nogemm.hardware.speeds import Speeds, use_speeds

# A run that a shell starts in the background inherits that Ctrl-C is ignored; tests send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same few examples in every run, or many new ones: `pytest --hypothesis-profile=many`. A machine may be busy, so no
# example has a time to keep; fixtures set what is the same for all examples.
_ALL = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("few", max_examples=4, derandomize=True, **_ALL)
settings.register_profile("many", max_examples=100, print_blob=True, **_ALL)
settings.load_profile("few")

# What a test measures about the machine is not kept for the user who runs it.
_CACHE = tempfile.TemporaryDirectory(prefix="nogemm-tests-")
os.environ["NOGEMM_CACHE"] = _CACHE.name

# Of no machine in particular: reading a row costs 20 times what multiplying it does for many tokens.
SPEEDS = Speeds(
    cores=2,
    product_ns={1: 100.0, 64: 10.0},
    rows_ns={dtype: {1: 100.0, 64: 200.0} for dtype in ("fp32", "bf16", "int8")},
    widen_ns={"bf16": 100.0, "int8": 200.0},
    call_us=0.1,
)


@pytest.fixture(params=ops.supported_isas() or ("reference",))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once under every instruction set that was built and that this machine has."""
    with ops.use_isa(request.param):
        yield request.param


@pytest.fixture
def compiler() -> str:
    """Name torch.compile's backend: inductor where it can build its modules, else the tracing alone."""
    return "inductor" if peers.missing("inductor-fp32") is None else "aot_eager"


@pytest.fixture(autouse=True)
def _same_state_for_every_test() -> Iterator[None]:
    """Start from one seed, and undo what a test does to the number of threads."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="session")
def _runs_are_trials() -> Iterator[None]:
    """Let benches run a round or two: what they do is tested, not the machine."""
    with trial_runs():
        yield


@pytest.fixture(autouse=True)
def _same_paths_on_every_machine() -> Iterator[None]:
    """Let packed layers choose their path by fixed speeds."""
    with use_speeds(SPEEDS):
        yield
