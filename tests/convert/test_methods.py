"""Every method inside whole models: convert, fit, distil, save, reload, pack."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_minilm import TEXTS, minilm, tokenizer
from tiny_models import FAMILIES, Family

import nogemm
from nogemm.config import LayerConfig

__all__ = ["minilm", "tokenizer"]  # fixtures

CONFIGS: list[LayerConfig] = [
    nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.AcdcConfig(depth=2)),
    nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.RandomHadamardConfig()),
    nogemm.YosoConfig(hashes=16, bits=3),
    nogemm.YosoConfig(hashes=16, bits=3, unit=True, gain=True),
    nogemm.HireConfig(keep=0.5, sketch="int4", static=2),
    nogemm.HireConfig(keep=0.5, sketch="low_rank", group=4),
    nogemm.SwitchConfig(experts=3, hidden=12),
    nogemm.ShuffleConfig(block=8),
    nogemm.TreeConfig(trees=3, depth=3, core=2, branch="bias", routing="straight_through", balance="loss"),
    nogemm.LeafTreeConfig(depth=2, leaf_width=3, master=2, routing="straight_through", balance=0.1),
    nogemm.SlideConfig(bits=3, tables=4),
    nogemm.MongooseConfig(bits=3, tables=4),
    nogemm.SlideConfig(bits=3, tables=4, projection=nogemm.RandomHadamardConfig()),
    nogemm.MongooseConfig(bits=3, tables=4, projection=nogemm.BHConfig(block=8)),
    nogemm.YosoConfig(hashes=16, bits=3, projection=nogemm.AcdcConfig(depth=2)),
    nogemm.SwitchConfig(experts=3, hidden=12, projection=nogemm.ShuffleProjectionConfig(block=8)),
]
methods = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
families = pytest.mark.parametrize("family", [FAMILIES["bert"], FAMILIES["llama"]], ids=["bert", "llama"])


def take_two_steps(model: Any, family: Family) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        model(**family.inputs())[0].square().mean().backward()
        optimiser.step()


@methods
@families
def test_convert_train_save_reload_pack(config: LayerConfig, family: Family, tmp_path: Path) -> None:
    model = family.build()
    nogemm.convert(model, config, data=[family.inputs(8, 16)])
    layers = list(nogemm.converted(model).values())
    before = [p.detach().clone() for layer in layers for p in layer.parameters()]
    model.train()
    take_two_steps(model, family)
    model.eval()
    after = [p for layer in layers for p in layer.parameters()]
    assert sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) > len(after) // 2
    expected = family.output(model)
    nogemm.save(model, tmp_path / "model")
    loaded = family.auto.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(family.output(loaded), expected)
    for dtype, tolerance in (("fp32", 1e-4), ("bf16", 0.1), ("int8", 0.2)):
        packed = nogemm.pack(copy.deepcopy(loaded), dtype=dtype)
        error = (family.output(packed) - expected).norm() / expected.norm()
        assert float(error) < tolerance


@methods
def test_lower_precision_models_convert(config: LayerConfig) -> None:
    family = FAMILIES["bert"]
    model = family.build().to(torch.bfloat16)
    nogemm.convert(model, config)
    assert family.output(model).isfinite().all()


@pytest.mark.parametrize(
    ("config", "least"),
    [
        (nogemm.YosoConfig(hashes=128, bits=4), 0.6),
        (nogemm.HireConfig(keep=0.25), 0.6),
        (nogemm.SwitchConfig(experts=4, hidden=768), 0.8),
        (nogemm.ShuffleConfig(block=96), 0.6),
        (nogemm.TreeConfig(trees=16, depth=4, core=32), 0.6),
        (nogemm.LeafTreeConfig(depth=2, leaf_width=64), 0.6),
        (nogemm.SlideConfig(bits=5, tables=16), 0.6),
        (nogemm.MongooseConfig(bits=5, tables=16), 0.6),
    ],
    ids=lambda c: getattr(c, "kind", ""),
)
def test_the_real_model_converts_and_packs(
    config: LayerConfig, least: float, minilm: str, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModel

    model, teacher = AutoModel.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    report = nogemm.convert(model, config, layers=[5], data=TEXTS * 4, tokenizer=tokenizer)
    assert [site.fitted for site in report.sites] == ["closed-form"]
    with torch.no_grad():
        ours, theirs = model(**batch).last_hidden_state, teacher(**batch).last_hidden_state
        assert float(torch.cosine_similarity(ours.flatten(1), theirs.flatten(1)).min()) > least
        nogemm.save(model, tmp_path / "model")
        loaded = nogemm.pack(AutoModel.from_pretrained(tmp_path / "model").eval())
        torch.testing.assert_close(loaded(**batch).last_hidden_state, ours, rtol=1e-3, atol=1e-3)
