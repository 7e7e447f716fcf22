"""Fixtures for training tests."""

from __future__ import annotations

import pytest
from tiny_training import Pair, WordTokenizer, make_pair


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def pair() -> Pair:
    return make_pair()
