"""Models whose classes nobody listed: discovered, proven, converted, trained, saved, loaded without a proof, packed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import FAMILIES as TINY
from tiny_models import SMALL, Family, train_a_little
from torch import nn
from unlisted_models import REMOTE_CONFIG, REMOTE_MODEL, UNLISTED

import nogemm
from nogemm.convert import discover
from nogemm.convert._candidates import find_candidates
from nogemm.convert._families import FAMILIES, listed_adapter
from nogemm.convert._proof import prove
from nogemm.convert._running import Unproven, random_calls
from nogemm.convert.sites import record_sites, site_names

unlisted = pytest.mark.parametrize("family", UNLISTED.values(), ids=UNLISTED.keys())


@unlisted
def test_a_model_that_nobody_listed(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test per model, so that the tiny model and its proof are made once."""
    dense = family.build()
    found = nogemm.sites(dense)
    assert tuple(site.name for site in found) == family.names
    assert {(site.d_in, site.d_out, site.gated) for site in found} == {(16, 16, family.gated)}
    assert nogemm.refused(dense) == []

    expected = family.output(dense)
    exact = copy.deepcopy(dense)
    nogemm.convert(exact, nogemm.DenseConfig())
    torch.testing.assert_close(family.output(exact), expected, rtol=1e-4, atol=1e-5)
    if not family.inner_dropout:  # equal seeds give equal masks only if every dropout is still called, in this order
        torch.manual_seed(3)
        expected = family.output(dense.train())
        torch.manual_seed(3)
        torch.testing.assert_close(family.output(exact.train()), expected, rtol=1e-4, atol=1e-5)
        dense.eval()

    model = copy.deepcopy(dense)
    nogemm.convert(model, SMALL, layers=[-1])
    assert tuple(site_names(model)) == family.names
    if family.names[1:]:
        nogemm.convert(model, SMALL, layers=list(range(len(family.names) - 1)))
    answer = model(**family.inputs())
    torch.stack([v.square().mean() for v in answer.values() if isinstance(v, torch.Tensor)]).sum().backward()
    layers = nogemm.converted(model)
    assert tuple(layers) == family.names
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for layer in layers.values() for p in layer.parameters())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    with record_sites(model) as seen:
        family.output(model)
    assert list(seen) == list(family.names)

    nogemm.save(model, tmp_path / "saved")
    monkeypatch.setattr(discover, "prove", None)  # loading needs no proof
    monkeypatch.setattr(discover, "_ANSWERS", {})
    loaded, info = family.auto.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(family.output(loaded), family.output(model), rtol=1e-5, atol=1e-6)
    nogemm.pack(loaded)
    assert torch.isfinite(family.output(loaded)).all()


def test_sites_left_dense_keep_their_names_in_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = UNLISTED["mpnet"]
    model = family.build()
    nogemm.convert(model, SMALL, layers=[1])
    train_a_little(model)
    model.save_pretrained(tmp_path / "one")
    monkeypatch.setattr(discover, "prove", None)
    monkeypatch.setattr(discover, "_ANSWERS", {})
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "one")  # the names are the base model's
    assert site_names(loaded) == ["mpnet.encoder.layer.0", "mpnet.encoder.layer.1"]
    nogemm.convert(loaded, SMALL, layers=[0])
    assert list(nogemm.converted(copy.deepcopy(loaded))) == ["mpnet.encoder.layer.0", "mpnet.encoder.layer.1"]
    train_a_little(loaded)
    loaded.save_pretrained(tmp_path / "both")
    assert len(nogemm.converted(transformers.AutoModel.from_pretrained(tmp_path / "both"))) == 2


def test_distil_trains_discovered_sites() -> None:
    family = UNLISTED["mpnet"]
    teacher = family.build()
    model = copy.deepcopy(teacher)
    nogemm.convert(model, SMALL)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(3, 64, (2, 9)), "attention_mask": torch.ones(2, 9).long()} for _ in range(6)]
    before = (family.output(model) - family.output(teacher)).square().mean()
    fitted = copy.deepcopy(teacher)
    report = nogemm.convert(fitted, SMALL, data=batches)
    assert {site.fitted for site in report.sites} == {"closed-form"}
    assert (family.output(fitted) - family.output(teacher)).square().mean() < before


def test_discovery_leaves_the_model_and_the_generators_alone() -> None:
    family = UNLISTED["bart"]
    model = family.build().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    keys = [set(vars(module)) for module in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    calls: list[int] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    expected = torch.rand(3), random.random()
    torch.manual_seed(5)
    random.seed(5)
    discover._ANSWERS.clear()
    assert len(nogemm.sites(model)) == 2
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert {(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()} == {(1, 0)}
    assert calls == []  # a user's hook sees nothing of the proof
    assert [set(vars(module)) for module in model.modules()] == keys
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_equal_layers_are_proven_once(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = []

    def counted(*args: Any) -> Any:
        proofs.append(args[0].name)
        return prove(*args)

    monkeypatch.setattr(discover, "prove", counted)
    monkeypatch.setattr(discover, "_ANSWERS", {})
    nogemm.sites(UNLISTED["mpnet"].build())
    assert proofs == ["encoder.layer.0"]
    nogemm.sites(UNLISTED["mpnet"].build(seed=1))
    assert len(proofs) == 1
    proofs.clear()
    nogemm.sites(TINY["bert"].build())
    assert proofs == []  # a listed class needs none


def test_weights_that_are_not_loaded_are_refused_not_run() -> None:
    with torch.device("meta"):
        model = transformers.MPNetModel(UNLISTED["mpnet"].build().config)
    discover._ANSWERS.clear()
    assert nogemm.sites(model) == []
    assert "not in memory" in nogemm.refused(model)[0].reason


@functools.cache
def _homes() -> dict[str, str]:
    """Return {listed class: module of transformers that defines it}."""
    homes: dict[str, str] = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+)\(", file.read_text(), re.MULTILINE):
            homes.setdefault(name, f"{file.parent.name}.{file.stem}")
    return homes


def _module(name: str) -> nn.Module:
    """Build a listed class by itself, small."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    modeling = importlib.import_module(f"transformers.models.{_homes()[name]}")
    configs = [value for key, value in vars(modeling).items() if key.endswith("Config") and key != "PreTrainedConfig"]
    config: Any = next((c for c in configs if "Text" in c.__name__ or "Vision" in c.__name__), configs[0])()
    for key, value in {**small, "ffn_dim": 32, "mlp_ratio": 2, "layer_idx": 0, "word_embed_proj_dim": 16}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    for key, value in {"dim": 16, "hidden_dim": 32, "n_heads": 2, "d_model": 16, "d_ff": 32, "pad_token_id": 0}.items():
        if hasattr(config, key):
            setattr(config, key, value)
    config._attn_implementation = "eager"
    cls = getattr(modeling, name)
    return cls(32, config) if name in ("GPT2MLP", "GPTBigCodeMLP", "GPTNeoMLP") else cls(config)


# Gemma 3n's has a cutoff of its own, which no proof guesses: tests/convert/test_decoders.py compares it.
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"Gemma3nTextMLP"}))
def test_listed_classes_go_through_the_same_proof(name: str) -> None:
    module = _module(name)
    adapter = listed_adapter(type(module))
    assert adapter is not None
    (candidate,) = find_candidates(nn.Sequential(module), [])
    calls = random_calls(candidate.d)
    assert prove(candidate, calls, adapter) == adapter
    own = prove(candidate, calls)  # what discovery makes of it reads the same matrices
    assert {own.up, own.gate, own.down} == {adapter.up, adapter.gate, adapter.down}
    other = "silu" if name in ("ArceeMLP", "NemotronMLP", "PersimmonMLP") else "relu2"
    with pytest.raises(Unproven):  # negative control: the same wiring with another activation
        prove(candidate, calls, dataclasses.replace(adapter, activation=other, put=""))


def test_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose code lies beside its weights: an FFN with its activation spelt out, gate and up fused, up first."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    source = tmp_path / "source"
    source.mkdir()
    (source / "configuration_odd.py").write_text(REMOTE_CONFIG)
    (source / "modeling_odd.py").write_text(REMOTE_MODEL)
    (source / "config.json").write_text(
        '{"model_type": "odd", "auto_map": {"AutoConfig": "configuration_odd.OddConfig", '
        '"AutoModel": "modeling_odd.OddModel"}}'
    )
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
    dense = transformers.AutoModel.from_config(config, trust_remote_code=True).eval()
    dense.save_pretrained(tmp_path / "dense")
    dense = transformers.AutoModel.from_pretrained(tmp_path / "dense", trust_remote_code=True)
    assert [(site.name, site.gated, site.activation) for site in nogemm.sites(dense)] == [
        ("layers.0.mlp", True, "gelu"),
        ("layers.1.mlp", True, "gelu"),
    ]
    ids = torch.arange(1, 8)[None]
    with torch.no_grad():
        expected = dense(ids).last_hidden_state
        exact = copy.deepcopy(dense)
        nogemm.convert(exact, nogemm.DenseConfig())
        torch.testing.assert_close(exact(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        nogemm.convert(dense, SMALL)
        train_a_little(dense)
        nogemm.save(dense, tmp_path / "converted")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "converted", trust_remote_code=True)
        assert len(nogemm.converted(loaded)) == 2
        torch.testing.assert_close(loaded(ids).last_hidden_state, dense(ids).last_hidden_state)
        nogemm.pack(loaded)
        assert torch.isfinite(loaded(ids).last_hidden_state).all()
