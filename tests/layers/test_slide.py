"""SLIDE: its random hashes are all its own; `test_hashed.py` has what it shares with MONGOOSE."""

from __future__ import annotations

import pytest
import torch

import nogemm


def test_the_papers_chunk_retrieves_a_third() -> None:
    layer = nogemm.SlideConfig(bits=10, tables=3, chunk=128).build(512, hidden=2048)
    assert layer.expected_active(128) / 2048 == pytest.approx(0.315, abs=0.005)


def test_published_layers_draw_the_same_signs_and_others_their_own() -> None:
    faithful = [nogemm.SlideConfig(faithful=True).build(12).planes for _ in range(2)]
    assert torch.equal(*faithful)
    own = [nogemm.SlideConfig().build(12).planes for _ in range(2)]
    assert not torch.equal(*own)
