"""The table of sites: every family's FFN is read exactly, replaced in place, and the rest of the model runs on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES as TINY
from tiny_models import SMALL, Family
from torch import Tensor, nn

import nogemm
from nogemm.convert._families import FAMILIES, GROUPS
from nogemm.convert.sites import record_sites, site_names
from nogemm.layers import DenseFFN


def test_names_follow_model_order_and_widths_are_read(family: Family) -> None:
    found = nogemm.sites(family.build())
    assert tuple(site.name for site in found) == family.names
    assert {(site.d_in, site.d_out, site.hidden, site.gated) for site in found} == {(16, 16, 32, family.gated)}


def test_dense_copy_answers_as_the_model(family: Family) -> None:
    model = family.build()
    with record_sites(model) as seen:
        family.output(model)
    for site in nogemm.sites(model):
        x, y = seen[site.name]
        dense = site.dense()
        torch.testing.assert_close(dense(x), y, rtol=1e-5, atol=1e-6)
        # Negative control: the comparison sees one wrong weight.
        with torch.no_grad():
            dense.down.weight[0, 0] += 1.0
        assert not torch.allclose(dense(x), y, rtol=1e-5, atol=1e-6)


def test_dense_replacement_keeps_the_models_output(family: Family) -> None:
    model = family.build()
    expected = family.output(model)
    report = nogemm.convert(model, nogemm.DenseConfig())
    assert [site.fitted for site in report.sites] == ["exact"] * len(family.names)
    torch.testing.assert_close(family.output(model), expected, rtol=1e-4, atol=1e-5)


def test_dropout_residual_and_norm_stay_in_training(family: Family) -> None:
    if family.inner_dropout:
        model = family.build()
        nogemm.convert(model, nogemm.DenseConfig())
        expected = family.output(model)
        model.train()
        assert not torch.allclose(family.output(model), expected, atol=1e-4)  # the caller's own dropout is at work
        return
    model = family.build().train()
    torch.manual_seed(3)
    expected = family.output(model)
    nogemm.convert(model, nogemm.DenseConfig())
    assert all(layer.training for layer in nogemm.converted(model).values())
    torch.manual_seed(3)  # equal seeds give equal masks only if every dropout is still called, in the same order
    torch.testing.assert_close(family.output(model), expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_every_new_parameter(family: Family) -> None:
    model = family.build()
    nogemm.convert(model, SMALL)
    model(**family.inputs())[0].square().sum().backward()
    for name, layer in nogemm.converted(model).items():
        for key, parameter in layer.named_parameters():
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.abs().sum() > 0, (name, key)


def test_names_and_indices_stay_after_conversion(family: Family) -> None:
    model = family.build()
    nogemm.convert(model, SMALL, layers=[1])
    assert tuple(site_names(model)) == family.names
    assert list(nogemm.converted(model)) == [family.names[1]]
    assert [site.name for site in nogemm.sites(model)] == [family.names[0]]


def test_recording_sees_converted_sites_too(bert: Family) -> None:
    model = bert.build()
    nogemm.convert(model, SMALL, layers=[0])
    with record_sites(model) as seen:
        bert.output(model)
    assert list(seen) == list(bert.names)
    layer = nogemm.converted(model)[bert.names[0]]
    x, y = seen[bert.names[0]]
    torch.testing.assert_close(layer(x), y)
    seen.clear()
    bert.output(model)
    assert not seen  # the hooks are gone


class Swish(nn.Module):
    """A user's own FFN, with a hard-coded activation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.drop = nn.Linear(8, 12), nn.Linear(12, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.leave(nn.functional.silu(self.enter(x))))


class Shouting(Swish):
    """A subclass that computes something else: not a site."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Holder(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


@pytest.fixture
def swish_site() -> Iterator[None]:
    nogemm.register_site(Swish, up="enter", down="leave", activation="silu", dropout="drop")
    yield
    del FAMILIES["Swish"]


def test_a_user_registers_a_class(swish_site: None) -> None:
    model = Holder(Swish()).eval()
    x = torch.randn(3, 8)
    expected = model(x)
    nogemm.convert(model, nogemm.DenseConfig())
    assert isinstance(nogemm.converted(model)["ffn"], DenseFFN)
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model.ffn.dropout, nn.Dropout)


def test_a_subclass_counts_only_if_it_computes_the_same(swish_site: None) -> None:
    same = type("Renamed", (Swish,), {})
    assert [site.name for site in nogemm.sites(Holder(same()))] == ["ffn"]
    assert nogemm.sites(Holder(Shouting())) == []


def test_a_name_is_registered_once(swish_site: None) -> None:
    nogemm.register_site("Swish", up="enter", down="leave", activation="silu", dropout="drop")  # equal: fine
    with pytest.raises(nogemm.ConfigError, match="'Swish' is registered already"):
        nogemm.register_site("Swish", up="leave", down="enter", activation="silu")


def test_a_model_that_is_itself_the_ffn_is_refused(swish_site: None) -> None:
    with pytest.raises(nogemm.ConfigError, match="module that holds it"):
        nogemm.convert(Swish(), nogemm.DenseConfig())


class Block(nn.Module):
    """A class that holds more than its FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.ffn = nn.Linear(8, 8), Swish()

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn.leave(nn.functional.silu(self.ffn.enter(self.attention(x))))


def test_an_adapter_that_would_drop_other_weights_is_refused() -> None:
    nogemm.register_site("Block", up="ffn.enter", down="ffn.leave", activation="silu")
    try:
        with pytest.raises(nogemm.ConfigError, match=r"Block holds weights beside its FFN \(attention\.weight"):
            nogemm.convert(Holder(Block()), nogemm.DenseConfig())
    finally:
        del FAMILIES["Block"]


def test_an_activation_we_cannot_compute_is_named(bert: Family) -> None:
    model = transformers.BertModel(
        transformers.BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                vocab_size=64, hidden_act="mish")
    )  # fmt: skip
    with pytest.raises(nogemm.ConfigError, match=r"'encoder.layer.0' uses the activation 'MishActivation'"):
        nogemm.convert(model, nogemm.DenseConfig())
    report = nogemm.convert(model, SMALL)  # needs no dense twin
    assert report.sites[0].fitted == "random"


def _classes() -> dict[str, ast.ClassDef]:
    """Parse every class of the table out of transformers' sources."""
    wanted = re.compile(r"^class (" + "|".join(FAMILIES) + r")\(", re.MULTILINE)
    found: dict[str, ast.ClassDef] = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = file.read_text()
        if wanted.search(text):
            for node in ast.parse(text).body:
                if isinstance(node, ast.ClassDef) and node.name in FAMILIES:
                    found.setdefault(node.name, node)
    return found


def _body(node: ast.ClassDef, method: str) -> str:
    """Return a method's statements, its argument renamed and its comments gone."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == method:
            argument = item.args.args[1].arg if len(item.args.args) > 1 else "_"
            code = [s for s in item.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            return re.sub(rf"\b{argument}\b", "X", "\n".join(ast.unparse(s) for s in code))
    return ""


def test_every_class_of_a_group_computes_what_its_first_does() -> None:
    classes = _classes()
    assert set(classes) == set(FAMILIES)
    for names in GROUPS.values():
        method = "feed_forward_chunk" if names[0] == "BertLayer" else "forward"
        first = _body(classes[names[0]], method)
        assert first
        for name in names[1:]:
            assert _body(classes[name], method) == first, f"{name} differs from {names[0]}"


def test_the_source_comparison_sees_a_difference() -> None:
    classes = _classes()
    assert _body(classes["LlamaMLP"], "forward") != _body(classes["Phi3MLP"], "forward")


def test_families_cover_the_promised_ones() -> None:
    promised = {"bert", "roberta", "distilbert", "modernbert", "vit", "gpt2", "opt", "llama", "qwen3", "t5"}
    assert promised <= set(TINY)
    seen: set[Any] = {type(TINY[name].build().config).model_type for name in promised}
    assert len(seen) == len(promised)
