"""TreeFFN inside whole models: convert, fit, train, save, reload, pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, Family

import nogemm
from nogemm.layers import TreeFFN

TREE = nogemm.TreeConfig(trees=3, depth=3, core=2, branch="bias", routing="straight_through", balance="loss")
families = pytest.mark.parametrize("family", [FAMILIES["bert"], FAMILIES["llama"]], ids=["bert", "llama"])


def take_two_steps(model: Any, family: Family) -> None:
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        model(**family.inputs())[0].square().mean().backward()
        optimiser.step()
    model.eval()


@families
def test_convert_train_save_reload_pack(family: Family, tmp_path: Path) -> None:
    model = family.build()
    report = nogemm.convert(model, TREE)
    assert [site.fitted for site in report.sites] == ["random", "random"]
    layers = list(nogemm.converted(model).values())
    assert all(isinstance(layer, TreeFFN) and layer.d_model == 16 for layer in layers)
    before = [p.detach().clone() for layer in layers for p in layer.parameters()]
    take_two_steps(model, family)
    after = [p for layer in layers for p in layer.parameters()]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    expected = family.output(model)
    nogemm.save(model, tmp_path / "model")
    loaded = family.auto.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(family.output(loaded), expected)
    packed = nogemm.pack(loaded, dtype="fp32")
    torch.testing.assert_close(family.output(packed), expected, rtol=1e-4, atol=1e-5)


@families
def test_activations_give_a_closed_form_start(family: Family) -> None:
    model = family.build()
    report = nogemm.convert(model, TREE, data=[family.inputs(8, 16)])
    assert [site.fitted for site in report.sites] == ["closed-form", "closed-form"]
    assert torch.isfinite(family.output(model)).all()


def test_the_activation_follows_the_model() -> None:
    model = FAMILIES["llama"].build()
    nogemm.convert(model, nogemm.TreeConfig(depth=2))
    layers = [layer for layer in nogemm.converted(model).values() if isinstance(layer, TreeFFN)]
    assert [layer.activation for layer in layers] == ["silu", "silu"]
