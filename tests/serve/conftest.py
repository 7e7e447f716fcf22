"""Servers of small models, one of each for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import people
from served import Served


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence encoder that takes the first token's state, texts of at most 30 tokens."""
    folder = people.sentence_encoder(tmp_path_factory.mktemp("serve") / "encoder", mode="cls")
    people.edit(folder / "sentence_bert_config.json", max_seq_length=30)
    return folder


@pytest.fixture(scope="module")
def server(encoder: Path) -> Iterator[Served]:
    """Two workers, small limits."""
    limits = {"body_bytes": 20_000, "request_texts": 40, "request_tokens": 500, "receive_seconds": 1}
    found = Served(encoder, "--workers", 2, *(f"--limit={name}={value}" for name, value in limits.items()))
    yield found
    found.stop()
