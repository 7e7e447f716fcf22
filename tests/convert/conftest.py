"""Fixtures for conversion tests."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import FAMILIES, SMALL, Family, train_a_little

import nogemm


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def bert() -> Family:
    return FAMILIES["bert"]


@pytest.fixture
def converted_bert(bert: Family) -> Any:
    """A converted BERT whose tables are no longer random, so that nothing warns."""
    model = bert.build()
    nogemm.convert(model, SMALL)
    train_a_little(model)
    return model
