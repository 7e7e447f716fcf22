"""Fixtures for tests of exported models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_export import WORDS, build
from transformers import BertTokenizer

from nogemm.export import extension_path


@pytest.fixture
def converted() -> Any:
    return build()


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(tmp_path / "vocab.txt"))


@pytest.fixture(scope="session")
def library() -> Path:
    return extension_path()
