"""Every kept input of every fuzz target, and its seeds: a right answer or an error of ours."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from fuzz_main import TARGETS
from fuzz_target import Target, Violation, answer_or_error, bounded, kept_inputs

from nogemm.errors import ConfigError

KEPT = [pytest.param(name, path, id=f"{name}-{path.name}") for name in TARGETS for path in kept_inputs(name)]


def target(name: str) -> Target:
    return importlib.import_module(f"fuzz_{name}").TARGET


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    for seed in target(name).seeds():
        target(name).run(seed)


@pytest.mark.parametrize(("name", "path"), KEPT)
def test_kept_inputs(name: str, path: Path) -> None:
    target(name).run(path.read_bytes())


def refuse(error: Exception) -> None:
    raise error


def test_the_property_can_fail() -> None:
    """Negative control: what must not pass does not."""
    assert answer_or_error(lambda: 3) == 3
    assert answer_or_error(lambda: refuse(ConfigError("tables must be positive"))) is None
    for error in (KeyError("rows"), RecursionError(), ConfigError("")):
        with pytest.raises(Violation):
            answer_or_error(lambda error=error: refuse(error))
    with pytest.raises(Violation, match="bytes of memory"), bounded(10):
        bytearray(200 << 20)
