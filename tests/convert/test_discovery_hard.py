"""FFNs with something in, at or behind them: taken out rightly, or refused by name with the reason."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import BERT, SMALL
from tiny_models import FAMILIES as TINY
from torch import Tensor, nn

import nogemm
from nogemm.convert.discover import Refusal
from nogemm.convert.sites import record_sites, site_names


def gelu(x: Tensor) -> Tensor:
    """A function whose name says less than it does."""
    return F.gelu(x, approximate="tanh")


class Ffn(nn.Module):
    """What a forward may use; every case below is a subclass with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down, self.act = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8), nn.GELU()
        self.drop, self.drop2, self.p_drop = nn.Dropout(0.3), nn.Dropout(0.2), 0.3
        self.norm, self.wide_norm, self.function = nn.LayerNorm(8), nn.LayerNorm(20), gelu
        self.clipped = transformers.activations.ClippedGELUActivation(-10, 10)  # type: ignore[attr-defined]
        self.last: Any = None
        self.notes: list[Tensor] = []


class Layer(nn.Module):
    """Gives its FFN residual and LayerNorm, and reads what some FFNs leave behind."""

    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.ffn, self.norm, self.read = ffn, nn.LayerNorm(8), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn(x)
        return self.norm(x + (y[0] + self.read(y[1]) if isinstance(y, tuple) else y))


class Model(nn.Module):
    """Token ids in, so that the whole model can be run."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(8, 8), nn.ModuleList(layers)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def note(module: Any, h: Tensor) -> Tensor:
    """Keep the hidden layer for somebody else, in a list."""
    module.notes.append(h)
    return h


def keep(module: Any, h: Tensor) -> Tensor:
    """Keep the hidden layer for somebody else, as an attribute."""
    module._last = h
    return h


Forward = Callable[[Any, Tensor], Any]
RIGHT: dict[str, tuple[Forward, str]] = {
    "residual, norm and dropout inside": (lambda m, x: x + m.drop(m.down(m.act(m.up(m.norm(x))))), "put"),
    "a dropout between": (lambda m, x: m.down(m.drop(m.act(m.up(x)))), "whole"),
    "a dropout between and one behind": (lambda m, x: m.drop2(m.down(m.drop(m.act(m.up(x))))), "whole"),
    "one dropout in both places": (lambda m, x: m.drop(m.down(m.drop(m.act(m.up(x))))), "whole"),
    "a dropout by number behind": (
        lambda m, x: F.dropout(m.down(m.act(m.up(x))), m.p_drop, m.training),
        "put",
    ),
    "a dropout by number between, and a residual": (
        lambda m, x: x + m.down(F.dropout(m.act(m.up(x)), m.p_drop, m.training)),
        "put",
    ),
    "an activation spelt out": (lambda m, x: m.down(F.relu(m.up(x)).square()), "whole"),
    "a function in an attribute, misnamed": (lambda m, x: x + m.down(m.function(m.up(x))), "put"),
    "a gate that stays in the forward": (lambda m, x: x + m.down(m.act(m.gate(x)) * m.up(x)), "put"),
    "called twice": (lambda m, x: m.down(m.act(m.up(x))) + m.down(m.act(m.up(m.norm(x)))), "put"),
}
WRONG: dict[str, tuple[Forward, str]] = {
    "hidden layer returned": (lambda m, x: (m.down(h := m.act(m.up(x))), h), "uses the hidden layer"),
    "hidden layer kept": (lambda m, x: m.down(keep(m, m.act(m.up(x)))), "uses the hidden layer"),
    "hidden layer noted": (lambda m, x: m.down(note(m, m.act(m.up(x)))), "uses the hidden layer"),
    "a norm between": (lambda m, x: m.down(m.wide_norm(m.act(m.up(x)))), "a norm, a residual or another activation"),
    "a residual between": (lambda m, x: m.down(m.act(m.up(x)) + m.gate(x)), "a norm, a residual or another activation"),
    "another activation": (lambda m, x: m.down(F.mish(m.up(x))), "none of the activations that nogemm computes"),
    "an activation clipped far out": (lambda m, x: m.down(m.clipped(m.up(x))), "none of the activations"),
    "a scaled matrix": (lambda m, x: 0.5 * m.down(F.gelu(m.up(x))), "elsewhere, or something is added"),
    "an activation used twice": (lambda m, x: m.act(x) + m.down(m.act(m.up(x))), "the activation elsewhere"),
    "a residual, activation spelt out": (lambda m, x: x + m.down(F.gelu(m.up(x))), "or something is added"),
    "a weight read": (lambda m, x: m.down(m.act(m.up(x))) + m.up.weight.sum(), "a matrix or the activation elsewhere"),
    "one dropout in both places, and a residual": (
        lambda m, x: x + m.drop(m.down(m.drop(m.act(m.up(x))))),
        "a dropout is part of it that would be lost",
    ),
    "a dropout by number behind, activation spelt out": (
        lambda m, x: F.dropout(m.down(F.gelu(m.up(x))), m.p_drop, m.training),
        "a dropout is part of it that would be lost",
    ),
    "no effect": (lambda m, x: x + 0.0 * m.down(m.act(m.up(x))), "does not depend on it"),
}


def build(forward: Forward) -> Model:
    torch.manual_seed(0)
    cls = type("Case", (Ffn,), {"forward": forward})
    ffns = [cls(), cls()]
    used = set(forward.__code__.co_names)
    for ffn in ffns:
        for name in ("gate", "norm", "wide_norm", "clipped"):
            if name not in used:
                delattr(ffn, name)
    return Model(*(Layer(ffn) for ffn in ffns)).eval()


IDS = torch.arange(8)[None]


@pytest.mark.parametrize("case", RIGHT)
def test_taken_out_rightly(case: str) -> None:
    forward, way = RIGHT[case]
    model = build(forward)
    found = nogemm.sites(model)
    assert [site.name for site in found] == ["layers.0.ffn", "layers.1.ffn"]
    assert ("put" if found[0].adapter.put else "whole") == way
    with torch.no_grad():
        expected = model(IDS)
        exact = copy.deepcopy(model)
        nogemm.convert(exact, nogemm.DenseConfig())
        torch.testing.assert_close(exact(IDS), expected, rtol=1e-4, atol=1e-5)
        for twin in (model, exact):  # the dropout between goes with the matrices, so it is turned off in both
            for module in twin.train().modules():
                if "between" in case or "both" in case:
                    vars(module).update({k: 0.0 for k in vars(module) if k == "p_drop"})
                    if isinstance(module, nn.Dropout) and module.p == 0.3:
                        module.p = 0.0
        torch.manual_seed(3)
        expected = model(IDS)
        torch.manual_seed(3)
        torch.testing.assert_close(exact(IDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", WRONG)
def test_refused_by_name_with_the_reason(case: str) -> None:
    forward, reason = WRONG[case]
    model = build(forward)
    before = copy.deepcopy(model.state_dict())
    assert nogemm.sites(model) == []
    first, second = nogemm.refused(model)
    assert isinstance(first, Refusal)
    assert (first.name, second.name, first.holder) == ("layers.0.ffn", "layers.1.ffn", "Case")
    assert reason in first.reason
    with pytest.raises(nogemm.ConfigError, match=r"layers\.0\.ffn \(Case\): .*\(and 1 more like it\)"):
        nogemm.convert(model, SMALL)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_dropout_in_both_places_still_drops_behind() -> None:
    model = build(RIGHT["one dropout in both places"][0])
    nogemm.convert(model, nogemm.DenseConfig())
    layer: Any = model.layers[0]
    assert layer.ffn.dropout.p == 0.3


def test_a_name_proves_nothing() -> None:
    model = build(RIGHT["a function in an attribute, misnamed"][0])
    assert {site.activation for site in nogemm.sites(model)} == {"gelu_new"}
    stranger = type("LlamaMLP", (Ffn,), {"forward": lambda m, x: m.down(m.act(m.up(x)))})()  # a listed name
    site = nogemm.sites(Model(Layer(stranger)))[0]
    assert (site.adapter.up, site.adapter.gate) == ("up", None)  # its gate is never called


def test_wide_matrices_are_proven_too() -> None:
    """What rounding may do grows with the width; it must not hide what is wrong."""
    torch.manual_seed(0)
    for activation, expected in ((nn.GELU("tanh"), ["gelu_pytorch_tanh"]), (nn.Mish(), [])):
        ffn = nn.Sequential(nn.Linear(256, 8192), activation, nn.Linear(8192, 256), nn.Dropout(0.1))
        assert [site.activation for site in nogemm.sites(nn.Sequential(ffn))] == expected


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Split(nn.Module):
    """Two modules, the activation spelt out in the first, a tiny scale behind the second, both hard to see."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.scale = First(), nn.Linear(20, 8), nn.Parameter(torch.full((8,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.second(self.first(x))


def test_a_split_ffn_with_its_activation_spelt_out() -> None:
    (site,) = nogemm.sites(Model(Layer(Split())))
    assert site.adapter.put == "first"
    assert site.activation == "gelu"


class Peeping(Layer):
    """A parent that runs its FFN's first matrix past the FFN."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.read(self.ffn.up(x))  # type: ignore[operator, attr-defined]


def test_a_parent_that_reads_the_matrices_is_seen() -> None:
    ffn = type("Plain", (Ffn,), {"forward": lambda m, x: m.down(m.act(m.up(x)))})
    ffns = [ffn(), ffn()]
    for one in ffns:
        del one.gate, one.norm, one.wide_norm
    model = Model(Layer(ffns[0]), Peeping(ffns[1]))
    assert nogemm.sites(model) == []
    assert "past the module" in nogemm.refused(model)[0].reason


def test_shared_modules_and_shared_matrices_are_one_site() -> None:
    ffn = type("Plain", (Ffn,), {"forward": lambda m, x: m.down(F.gelu(m.up(x)))})
    block = type("Block", (Ffn,), {"forward": lambda m, x: x + m.down(m.act(m.up(m.norm(x))))})
    shared = ffn()
    first, second = block(), block()
    second.up, second.down = first.up, first.down
    for one in (shared, first, second):
        del one.gate, one.wide_norm
    del shared.norm
    model = Model(Layer(shared), Layer(first), Layer(shared), Layer(second)).eval()
    assert [site.name for site in nogemm.sites(model)] == ["layers.0.ffn", "layers.1.ffn"]
    with torch.no_grad():
        expected = model(IDS)
        nogemm.convert(model, nogemm.DenseConfig())
        torch.testing.assert_close(model(IDS), expected)
    layers: Any = model.layers
    assert layers[0].ffn is layers[2].ffn
    assert layers[1].ffn.up is layers[3].ffn.up
    with record_sites(model) as seen:
        model(IDS)
    assert list(seen) == ["layers.0.ffn", "layers.1.ffn"]


def test_mixtures_of_experts_are_refused_by_name() -> None:
    """Stacked in tensors, as transformers has them, or a list of FFNs; a shared expert goes with them."""
    config = transformers.Qwen2MoeConfig(
        **BERT, num_key_value_heads=2, num_experts=3, num_experts_per_tok=1, moe_intermediate_size=8,
        decoder_sparse_step=2, shared_expert_intermediate_size=24,
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    assert site_names(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert [str(refusal) for refusal in nogemm.refused(model)] == [
        "model.layers.1.mlp (Qwen2MoeSparseMoeBlock): a mixture of 3 experts, which is no dense FFN"
    ]
    with pytest.raises(nogemm.ConfigError, match=r"1 of the chosen sites cannot .*layers\.1\.mlp .*mixture of 3"):
        nogemm.convert(model, SMALL)
    report = nogemm.convert(model, SMALL, layers=[0])
    assert "left dense: model.layers.1.mlp (Qwen2MoeSparseMoeBlock)" in str(report)

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(_plain() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            share = self.router(x).softmax(-1)
            return sum(share[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore

    (refusal,) = nogemm.refused(Model(Layer(Routed())))
    assert (refusal.name, refusal.holder) == ("layers.0.ffn", "Routed")


def _plain() -> nn.Module:
    ffn = type("Plain", (Ffn,), {"forward": lambda m, x: m.down(m.act(m.up(x)))})()
    del ffn.gate, ffn.norm, ffn.wide_norm
    return ffn


class LoraLinear(nn.Module):
    """The form of PEFT's wrapper."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def quantise(model: nn.Module, path: str) -> None:
    small: Any = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.get_submodule(path)), {nn.Linear})
    model.set_submodule(path, small[0])


def wrap(model: nn.Module, path: str) -> None:
    model.set_submodule(path, LoraLinear(model.get_submodule(path)))


def parametrise(model: nn.Module, path: str) -> None:
    nn.utils.parametrizations.weight_norm(model.get_submodule(path))


@pytest.mark.parametrize(
    ("change", "words"),
    [(wrap, r"wrapped in LoraLinear: merge first, with model\.merge_and_unload"),
     (quantise, r"quantised or replaced already \(Linear\): convert the floating-point model"),
     (parametrise, r"computes its weight")],
)  # fmt: skip
@pytest.mark.parametrize("listed", [True, False])
def test_wrapped_and_quantised_matrices_keep_their_place(
    listed: bool, change: Callable[[nn.Module, str], None], words: str
) -> None:
    if listed:
        model: Any = TINY["bert"].build()
        names, path = list(TINY["bert"].names), "output.dense"
    else:
        torch.manual_seed(0)
        model, path = Model(Layer(_plain()), Layer(_plain())).eval(), "down"
        names = ["layers.0.ffn", "layers.1.ffn"]
    change(model, f"{names[0]}.{path}")
    assert site_names(model) == names
    assert [site.name for site in nogemm.sites(model)] == names[1:]
    message = rf"1 of the chosen sites cannot.*{re.escape(names[0])} .*: {re.escape(path)} .*{words}"
    for layers in ("all", [0]):
        with pytest.raises(nogemm.ConfigError, match=message):
            nogemm.convert(model, SMALL, layers=layers)  # type: ignore[arg-type]
        assert not nogemm.converted(model)
    nogemm.convert(model, SMALL, layers=[1])
    assert list(nogemm.converted(model)) == names[1:]
    assert site_names(model) == names


def test_torchs_own_encoder_layer_is_right_or_refused() -> None:
    """Its fast path in evaluation mode reads the weights past the modules."""
    layer = nn.TransformerEncoderLayer(8, 2, 20, batch_first=True)
    model = Model(layer).eval()
    assert nogemm.sites(model) == []
    assert [refusal.name for refusal in nogemm.refused(model)] == ["layers.0"]
