"""How FFNs of unlisted classes were taken out travels with the checkpoint; what is wrong with it is said by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import SMALL, train_a_little
from unlisted_models import UNLISTED

import nogemm
from nogemm.convert import _families, discover

MPNET = UNLISTED["mpnet"]
ADAPTER: dict[str, Any] = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "activation": "intermediate.intermediate_act_fn",
    "put": "intermediate",
}


@pytest.fixture
def unregistered() -> Iterator[Callable[[], None]]:
    """Forget what the test registered, as a new process would."""

    def forget() -> None:
        _families.FAMILIES.pop("MPNetLayer", None)
        _families.REGISTERED.discard("MPNetLayer")

    yield forget
    forget()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a model whose class is not listed; nothing can be proven from here on."""
    model = MPNET.build()
    nogemm.convert(model, SMALL)
    train_a_little(model)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(discover, "prove", None)
    monkeypatch.setattr(discover, "_ANSWERS", {})
    return tmp_path / "saved"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


def test_a_registered_class_loads_where_nobody_registered_it(
    unregistered: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discover, "prove", None)
    nogemm.register_site("MPNetLayer", **ADAPTER)
    model = MPNET.build()
    nogemm.convert(model, SMALL, layers=[0])
    train_a_little(model)
    model.save_pretrained(tmp_path)
    unregistered()
    monkeypatch.setattr(discover, "_ANSWERS", {})
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(MPNET.output(loaded), MPNET.output(model))
    assert [site.name for site in nogemm.sites(loaded)] == ["encoder.layer.1"]  # left dense, and remembered
    loaded.save_pretrained(tmp_path / "again")
    stored = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert stored["holders"] == {name: {"class": "MPNetLayer", **ADAPTER} for name in MPNET.names}


def test_an_older_checkpoint_says_which_class_to_register_and_how(unregistered: Callable[[], None], path: Path) -> None:
    edit(path, lambda stored: stored.pop("holders"))
    with pytest.raises(
        nogemm.CheckpointError,
        match=r"does not have: encoder\.layer\.0, encoder\.layer\.1\. It has: none that nogemm lists\. Before loading, "
        r'call nogemm\.register_site\("MPNetLayer", up=\.\.\.',
    ):
        transformers.AutoModel.from_pretrained(path)
    nogemm.register_site("MPNetLayer", **{**ADAPTER, "put": "intermediate.dense"})
    assert len(nogemm.converted(transformers.AutoModel.from_pretrained(path))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.update(holders=["encoder.layer.0"]), "holders must name sites"),
        (lambda stored: stored["holders"].update({"encoder.layer.0": 3}), r"'encoder\.layer\.0'.* cannot be read"),
        (lambda stored: stored["holders"]["encoder.layer.0"].update(colour="red"), r"cannot be read.*colour"),
        (lambda stored: stored["holders"]["encoder.layer.0"].update(down=7), "cannot be read.*a path must be a string"),
        (
            lambda stored: stored["holders"]["encoder.layer.0"].update(down="output.fc"),
            r"is a MPNetLayer with its FFN in intermediate\.dense, output\.fc, but the MPNetLayer .* no output\.fc",
        ),
    ],
)
def test_holders_that_cannot_be_right(path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(path, change)
    with pytest.raises(nogemm.CheckpointError, match=message):
        transformers.AutoModel.from_pretrained(path)


def test_listed_classes_store_none(tmp_path: Path) -> None:
    model = UNLISTED["phi"].build()
    nogemm.convert(model, SMALL)
    train_a_little(model)
    model.save_pretrained(tmp_path)
    assert "holders" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]


def test_a_dense_checkpoint_of_an_unlisted_class_is_converted_while_loading(tmp_path: Path) -> None:
    MPNET.build().save_pretrained(tmp_path)
    wanted = nogemm.NogemmConfig(nogemm.DenseConfig(), layers=[1])
    loaded = transformers.AutoModel.from_pretrained(tmp_path, quantization_config=wanted)
    assert list(nogemm.converted(loaded)) == ["encoder.layer.1"]
    torch.testing.assert_close(MPNET.output(loaded), MPNET.output(MPNET.build()))
