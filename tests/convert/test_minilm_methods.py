"""Every registered method in the real all-MiniLM-L6-v2: convert, two training steps, save, load, pack, compare."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

import nogemm
from nogemm.bench.engine.check import Bound, compare
from nogemm.bench.engine.rounding import check_packed
from nogemm.bench.models import sample_texts
from nogemm.config import layer_kinds, parse_layer
from nogemm.convert.sites import record_sites
from nogemm.layers import FFN, PACK_DTYPES, NoFFN, PackedFFN
from nogemm.layers.token_table.ids import given
from nogemm.models.loading import load_encoder, load_tokenizer

MINILM = "all-MiniLM-L6-v2"
# Small where the defaults mean hundreds of megabytes or minutes of fitting; any other method takes its defaults.
SMALLER = {
    "lookup": ("tables=32", "bits=6"),
    "yoso": ("hashes=32", "bits=5"),
    "hire": ("keep=0.1",),
    "tree": ("trees=8", "depth=5"),
    "switch": ("experts=4", "hidden=96"),
    "shuffle": ("block=96",),
    "sum": ("terms=dense+lookup", "dense.hidden=96", "lookup.tables=16", "lookup.bits=6"),
    "slide": ("bits=4", "tables=8"),
    "mongoose": ("bits=4", "tables=8"),
}


# torch's dynamic int8 has one step for all inputs of a call, and a real model's largest inputs make it a coarse one.
OUTLIERS = Bound(rms=0.35, token=1.0)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return load_encoder(MINILM)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(MINILM)


# What holds of every method alone is in tests/layers; of these three on a real model, always.
ALWAYS = ("dense", "hire", "lookup")


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS else pytest.param(kind, marks=pytest.mark.slow) for kind in layer_kinds()]
)
def test_the_whole_way_of_every_method(kind: str, teacher: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    model, texts = copy.deepcopy(teacher), sample_texts(12)
    config = parse_layer(kind, SMALLER.get(kind, ()))
    assert len(nogemm.convert(model, config, data=texts, tokenizer=tokenizer).sites) == 6
    train_a_little(model, teacher, tokenizer, texts)
    nogemm.save(model, tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model").eval()
    batch = tokenizer(texts[:4], padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad(), record_sites(loaded) as seen:
        expected = loaded(**batch).last_hidden_state
        torch.testing.assert_close(expected, model.eval()(**batch).last_hidden_state)
    layers = nogemm.converted(loaded)
    assert list(layers) == list(nogemm.converted(model))
    for dtype in PACK_DTYPES:
        packed = nogemm.pack(copy.deepcopy(loaded), dtype=dtype)
        with given(batch["input_ids"]):
            for (name, layer), twin in zip(layers.items(), outermost(packed), strict=True):
                check_site(layer, twin, seen[name][0].flatten(0, -2))
        with torch.no_grad():
            y = packed(**batch).last_hidden_state
        # Every site was held to its own bound above. A near tie that one layer decides otherwise moves what all later
        # ones choose: of 200 texts through six HireFFNs in float32, 5 % agreed by less than 0.999, the worst by 0.996.
        right = pooled(expected, batch)
        found, others = (whole_agreement(y, wanted, batch, dtype) for wanted in (right, right.roll(1, 0)))
        assert found > max(others, 0.98 if dtype == "fp32" else 0.5)


def train_a_little(model: nn.Module, teacher: nn.Module, tokenizer: Any, texts: list[str]) -> None:
    """Take a step or two on the layers alone and one or two on the whole model, which must move most of the weights."""
    before = [p.detach().clone() for p in new_parameters(model)]
    report = nogemm.distil(
        model,
        teacher,
        texts,
        tokenizer=tokenizer,
        tokens=200,
        batch_tokens=100,
        max_length=24,
        stage1_share=0.3,
        updates_per_batch=1,
        warmup=0.0,
        bar=False,
    )
    steps = [stage.steps for stage in report.stages]
    assert sum(steps) >= 2
    assert len(steps) == (2 if before else 1)  # a layer without weights cannot be fitted alone
    moved = [not torch.equal(old, new) for old, new in zip(before, new_parameters(model), strict=True)]
    assert sum(moved) >= len(moved) // 2


def new_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in nogemm.converted(model).values() for p in layer.parameters()]


def outermost(module: nn.Module) -> list[PackedFFN]:
    """List the packed sites in order; the terms of a sum are parts of theirs."""
    if isinstance(module, PackedFFN):
        return [module]
    return [twin for child in module.children() for twin in outermost(child)]


def check_site(layer: FFN, twin: PackedFFN, x_ND: Tensor) -> None:
    """Hold the packed layer against the unpacked one in float64; answers of other tokens must be noticed."""

    def answer(module: nn.Module, dtype: torch.dtype) -> Tensor:
        return module(x_ND.to(dtype))

    def check(actual_ND: Tensor) -> dict[str, Any]:
        if twin.dtype == "int8" and layer.dynamic_int8:
            return compare(actual_ND, answer(copy.deepcopy(layer).double(), torch.float64), OUTLIERS)
        return check_packed(layer, layer.rounded(twin.dtype), actual_ND, twin.dtype, answer)

    with torch.no_grad():
        y_ND = twin(x_ND)
        facts = check(y_ND)
        assert facts["verified"], facts
        wrong = [y_ND + 1.0] if isinstance(layer, NoFFN) else [y_ND.roll(1, 0), -y_ND]
        assert not any(check(other_ND)["verified"] for other_ND in wrong)


def whole_agreement(hidden_SLD: Tensor, right_SD: Tensor, batch: Any, dtype: str) -> float:
    """Return the cosine of the worst text in float32, of the average text in fewer bits."""
    agreement_S = torch.cosine_similarity(pooled(hidden_SLD, batch), right_SD)
    return float(agreement_S.min() if dtype == "fp32" else agreement_S.mean())


def pooled(hidden_SLD: Tensor, batch: Any) -> Tensor:
    """Average the tokens that are not padding, [S, D]."""
    mask_SL1 = batch["attention_mask"].unsqueeze(-1)
    return (hidden_SLD * mask_SL1).sum(1) / mask_SL1.sum(1)
