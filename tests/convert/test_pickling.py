"""A converted model is an object like any other: pickled, copied, quantised by torch, in any state."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, SMALL, Family
from torch import nn

import nogemm
from nogemm.convert.fitted import fitted_state
from nogemm.errors import CheckpointError

# A product of torch may end in other bits where its numbers lie at other addresses.
BITS: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def trained(bert: Family) -> Any:
    model = bert.build()
    nogemm.convert(model, {"*.0": SMALL, "*": nogemm.SwitchConfig(experts=2)})
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**bert.inputs())[0].square().sum().backward()
    optimiser.step()
    return model.eval()


@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_a_model_after_an_optimiser_step(bert: Family, packed: bool, tmp_path: Path) -> None:
    model = trained(bert)
    if packed:
        nogemm.pack(model, keep=True)
    expected = bert.output(model)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(bert.output(twin), expected, **BITS)
        if packed:
            nogemm.unpack(twin)
        assert {fitted_state(layer) for layer in nogemm.converted(twin).values()} == {"trained", "closed-form"}
        nogemm.save(twin, tmp_path / "model")
        loaded = bert.auto.from_pretrained(tmp_path / "model")
        if not packed:
            torch.testing.assert_close(bert.output(loaded), expected, **BITS)
        pickle.dumps(loaded)


def test_dynamic_quantisation_of_a_model(bert: Family, tmp_path: Path) -> None:
    """torch takes the matrices of our layers as it takes the model's own."""
    dense = bert.build()
    model = copy.deepcopy(dense)
    nogemm.convert(model, {"*.0": nogemm.DenseConfig(), "*": nogemm.SwitchConfig(experts=1)})
    quantised, expected = (torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in (model, dense))
    torch.testing.assert_close(bert.output(quantised), bert.output(expected), rtol=0.05, atol=0.02)
    with pytest.raises(CheckpointError, match="save: torch's dynamic quantisation has rounded matrices of the BertFor"):
        nogemm.save(quantised, tmp_path / "model")
    with pytest.raises(CheckpointError, match="save the model before it is quantised"):
        quantised.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_families_whose_dropout_goes_along_pickle(family: Family) -> None:
    model = family.build()
    nogemm.convert(model, nogemm.DenseConfig())
    twin = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(family.output(twin), family.output(model), **BITS)
    assert len(nogemm.converted(twin)) == len(FAMILIES[next(iter(FAMILIES))].names)
