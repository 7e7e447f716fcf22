"""pack, unpack, compress and decompress on models, and the warnings about random sites."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SMALL, Family, train_a_little

import nogemm
from nogemm.convert.fitted import fitted_state, is_random, mark_random
from nogemm.layers import FFN, LookupFFN, PackedFFN
from nogemm.testing.compare_model import check_same_model


def test_every_family_packs(family: Family) -> None:
    model = family.build()
    nogemm.convert(model, {family.names[0]: SMALL, family.names[1]: nogemm.DenseConfig()})
    train_a_little(model)
    expected = family.output(model)
    assert nogemm.pack(model) is model
    torch.testing.assert_close(family.output(model), expected, rtol=1e-4, atol=1e-5)
    assert not nogemm.converted(model)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_low_precision_stays_close(dtype: str, converted_bert: Any, bert: Family) -> None:
    expected = bert.output(converted_bert)
    nogemm.pack(converted_bert, dtype)
    close = (bert.output(converted_bert) - expected).abs() < 0.05
    assert close.float().mean() > 0.9  # a code may flip near a boundary


def test_unpacked_weights_are_freed(converted_bert: Any) -> None:
    layers = [weakref.ref(layer) for layer in nogemm.converted(converted_bert).values()]
    nogemm.pack(converted_bert)
    gc.collect()
    assert all(layer() is None for layer in layers)
    with pytest.raises(nogemm.PackedError, match="load the checkpoint again"):
        nogemm.unpack(converted_bert)


def test_keep_allows_unpacking(converted_bert: Any, bert: Family, tmp_path: Path) -> None:
    before = nogemm.converted(converted_bert)
    parameters = {name for name, _ in converted_bert.named_parameters()}
    nogemm.pack(converted_bert, "int8", keep=True)
    assert len({name for name, _ in converted_bert.named_parameters()}) < len(parameters)
    nogemm.unpack(converted_bert)
    assert nogemm.converted(converted_bert) == before
    converted_bert.save_pretrained(tmp_path)
    check_same_model("loaded", bert.auto.from_pretrained(tmp_path), converted_bert, bert.output)


def test_packing_in_training_mode_is_refused_before_anything_changes(converted_bert: Any) -> None:
    converted_bert.train()
    with pytest.raises(nogemm.PackedError, match=r"training mode; call model\.eval\(\)"):
        nogemm.pack(converted_bert)
    layer = nogemm.converted(converted_bert)["bert.encoder.layer.0"]
    with pytest.raises(nogemm.PackedError, match="training mode"):
        nogemm.pack(layer)
    converted_bert.eval()
    nogemm.converted(converted_bert)["bert.encoder.layer.1"].train()
    with pytest.raises(nogemm.PackedError, match="training mode"):
        nogemm.pack(converted_bert)
    assert len(nogemm.converted(converted_bert)) == 2


def test_training_a_packed_model_is_refused(converted_bert: Any, bert: Family) -> None:
    nogemm.pack(converted_bert)
    with pytest.raises(nogemm.PackedError, match="evaluation only"):
        converted_bert.train()
    converted_bert.eval()
    loss = converted_bert(**bert.inputs())[0].sum()
    with pytest.raises(nogemm.PackedError, match="no gradient"):
        loss.backward()


def test_saving_a_packed_model_is_refused(converted_bert: Any, tmp_path: Path) -> None:
    nogemm.pack(converted_bert)
    for model in (converted_bert, converted_bert.bert):
        with pytest.raises(nogemm.PackedError, match="save before packing"):
            model.save_pretrained(tmp_path / "model")
    with pytest.raises(nogemm.PackedError, match="save before packing"):
        nogemm.save(converted_bert, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_packing_again_or_nothing_or_wrongly_is_refused(converted_bert: Any, bert: Family) -> None:
    with pytest.raises(nogemm.ConfigError, match="dtype='fp64'"):
        nogemm.pack(converted_bert, "fp64")
    with pytest.raises(nogemm.ConfigError, match=r"no converted FFN and no converted head; run nogemm\.convert or"):
        nogemm.pack(bert.build())
    nogemm.pack(converted_bert)
    for action in (nogemm.pack, nogemm.compress, nogemm.decompress):
        with pytest.raises(nogemm.PackedError, match="packed"):
            action(converted_bert)


def test_a_layer_packs_into_a_new_one(converted_bert: Any) -> None:
    layer = nogemm.converted(converted_bert)["bert.encoder.layer.0"]
    packed = nogemm.pack(layer, keep=True)
    assert isinstance(packed, PackedFFN)
    assert packed.source is layer
    assert nogemm.pack(layer).source is None
    x = torch.randn(5, 16)
    torch.testing.assert_close(packed(x), layer(x), rtol=1e-4, atol=1e-5)


def test_converting_a_packed_site_again_is_refused(converted_bert: Any) -> None:
    nogemm.pack(converted_bert)
    with pytest.raises(nogemm.ConfigError, match="converted already"):
        nogemm.convert(converted_bert, SMALL, layers=[0])


@pytest.mark.parametrize("tables", ["int8", "bf16"])
def test_compress_and_back(tables: str, converted_bert: Any, bert: Family) -> None:
    expected = bert.output(converted_bert)
    size = sum(p.numel() * p.element_size() for p in converted_bert.state_dict().values())
    nogemm.compress(converted_bert, tables)
    compressed = bert.output(converted_bert)
    assert (compressed - expected).abs().max() < 0.02
    assert sum(p.numel() * p.element_size() for p in converted_bert.state_dict().values()) < size
    nogemm.decompress(converted_bert)
    torch.testing.assert_close(bert.output(converted_bert), compressed, rtol=1e-5, atol=1e-6)
    layers = list(nogemm.converted(converted_bert).values())
    assert all(isinstance(layer, LookupFFN) and layer.table_parameters() for layer in layers)


def test_compressed_models_pack_and_cast(converted_bert: Any, bert: Family) -> None:
    nogemm.compress(converted_bert, "int8")
    expected = bert.output(converted_bert)
    half = copy.deepcopy(converted_bert).half()
    assert ((bert.output(half).float() - expected).abs() < 0.05).float().mean() > 0.9
    nogemm.pack(converted_bert)
    torch.testing.assert_close(bert.output(converted_bert), expected, rtol=1e-4, atol=1e-5)


def test_compressing_the_other_way_starts_from_what_is_stored(converted_bert: Any) -> None:
    nogemm.compress(converted_bert, "int8")
    nogemm.compress(converted_bert, "int8")
    nogemm.compress(converted_bert, "bf16")
    layer = nogemm.converted(converted_bert)["bert.encoder.layer.0"]
    assert isinstance(layer, LookupFFN)
    assert layer.tables.dtype == torch.bfloat16
    with pytest.raises(nogemm.ConfigError, match="int4"):
        nogemm.compress(converted_bert, "int4")


def test_compressing_a_model_without_tables_is_refused(bert: Family) -> None:
    model = bert.build()
    nogemm.convert(model, nogemm.DenseConfig())
    with pytest.raises(nogemm.ConfigError, match="no converted FFN with tables"):
        nogemm.compress(model)


def _random_layer() -> FFN:
    layer = SMALL.build(16)
    mark_random(layer)
    assert is_random(layer)
    return layer


def test_packing_while_random_warns(bert: Family) -> None:
    model = bert.build()
    nogemm.convert(model, SMALL, layers=[0])
    with pytest.warns(UserWarning, match=r"pack: 1 converted FFNs are still random \(bert\.encoder\.layer\.0\)"):
        nogemm.pack(model)


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_any_optimiser_step_clears_random(optimiser: Any, bert: Family) -> None:
    model = bert.build()
    nogemm.convert(model, SMALL)
    steps = optimiser(model.parameters(), lr=1e-9)  # too small for the values to show it
    model(**bert.inputs())[0].square().sum().backward()
    steps.step()
    assert {fitted_state(layer) for layer in nogemm.converted(model).values()} == {"trained"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nogemm.pack(model)


def test_frozen_sites_stay_random(bert: Family) -> None:
    """Negative control: a step that leaves the layer alone does not clear it."""
    model = bert.build()
    nogemm.convert(model, SMALL)
    nogemm.converted(model)["bert.encoder.layer.0"].requires_grad_(False)
    steps = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**bert.inputs())[0].square().sum().backward()
    steps.step()
    assert [is_random(layer) for layer in nogemm.converted(model).values()] == [True, False]


def test_casts_copies_and_modes_do_not_look_like_training() -> None:
    layer = _random_layer()
    assert is_random(copy.deepcopy(layer))
    assert is_random(layer.train().eval())
    assert is_random(layer.to(torch.bfloat16))
    assert is_random(layer.float())


def test_writes_through_data_and_trained_copies_are_seen() -> None:
    layer = _random_layer()
    layer.get_parameter("tables").data.add_(0.1)
    assert not is_random(layer)
    twin = copy.deepcopy(_random_layer())
    with torch.no_grad():
        twin.get_parameter("tables").mul_(2.0)
    assert not is_random(twin)
    loaded = _random_layer()
    loaded.load_state_dict(SMALL.build(16).state_dict())
    assert not is_random(loaded)


@pytest.mark.parametrize("trained", [False, True])
def test_compression_remembers_whether_layers_are_random(trained: bool, bert: Family) -> None:
    model = bert.build()
    nogemm.convert(model, SMALL)
    if trained:
        train_a_little(model)
    nogemm.compress(model)
    assert {is_random(layer) for layer in nogemm.converted(model).values()} == {not trained}
