"""A search of seconds: a BERT of width 16 on made-up texts, its times made up from what its models hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import nogemm
import people
from nogemm import Tuned
from nogemm.bench.engine.measure import Spec
from nogemm.models.embed import embed
from nogemm.models.loading import load_encoder, load_tokenizer
from nogemm.tune import timing
from nogemm.tune.contender import scored

TEXTS = [" ".join(words) for words in itertools.permutations(people.WORDS[:6], 3)]
TINY: dict[str, Any] = {
    "shape": (1, 8), "offers": ("narrow-4", "none"), "rivals": ("torch-fp32",), "engine": "torch-fp32",
    "static": False, "shortlist": 3, "short_tokens": 200, "tokens": 500, "fit_tokens": 200, "evidence_texts": 8,
    "checked": 1, "rounds": 1, "seconds": 0.0, "threads": 1, "distil": {"batch_tokens": 128, "stage1_share": 0.3},
}  # fmt: skip


def dense(folder: Path, layers: int = 3) -> Path:
    """Save a small BERT with its tokenizer."""
    torch.manual_seed(0)
    settings: dict[str, Any] = people.SMALL | {"num_hidden_layers": layers}
    tf.BertModel(tf.BertConfig(**settings)).save_pretrained(folder)
    people.tokenizer(folder).save_pretrained(folder)
    return folder


class MadeUp:
    """In the place of `measure`: models are scored here, and a call takes what their weights say.

    Attributes:
        seen: names of contenders, in order.
        faults: {part of a name: error of its row}.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.faults: dict[str, str] = {}
        self.models: dict[str, Any] = {}

    def __call__(self, specs: Sequence[Spec], cases: Any, plan: Any, *, note: Any = None) -> list[dict[str, Any]]:
        return [self.row(spec, cases[0]) for spec in specs]

    def row(self, spec: Spec, case: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(spec.name)
        row = {"contender": spec.name, **case, "verified": False}
        fault = next((text for part, text in self.faults.items() if part in spec.name), None)
        if fault is not None:
            return row | {"error": fault}
        settings = spec.settings
        model: Any = load_encoder(settings.get("peer") or settings.get("model") or settings["dense"])
        us = 100.0 + sum(_us(layer) for layer in model.encoder.layer)
        us /= 2.0 if settings.get("engine") == "torch-int8" else 1.0
        row |= {"verified": True, "us_median": us, "us_p10": us, "us_p90": us, "calls": 1}
        if settings.get("score"):
            tokenizer = load_tokenizer(settings["dense"])
            row |= scored(settings, lambda texts: embed(model, tokenizer, texts))
        return row


def _us(layer: Any) -> float:
    return 50.0 + sum(p.numel() for p in layer.parameters()) / 10


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    found = MadeUp()
    monkeypatch.setattr(timing, "measure", found)
    return found


def tune(model: Path, folder: Path | None = None, data: Any = TEXTS, **changes: Any) -> Tuned:
    """Search with tiny options."""
    where = {name: changes.pop(name) for name in ("resume", "note", "keep") if name in changes}
    return nogemm.tune(str(model), data, output_dir=folder, **where, **TINY | changes)
