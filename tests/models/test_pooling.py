"""Embeddings by every description that sentence-transformers writes, against sentence-transformers itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nogemm.errors import ConfigError
from nogemm.models.pooling import MEAN, MODES, Pooling, pooled, pooling_of

KIND = "sentence_transformers.models."


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts, one of them padded in front, as a tokenizer for generation would."""
    hidden = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    return hidden, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 1, 1, 1]])


def theirs(modules: list[Any]) -> torch.Tensor:
    hidden, mask = batch()
    features: dict[str, Any] = {"token_embeddings": hidden, "attention_mask": mask}
    with torch.no_grad():
        for module in modules:
            features = module(features)
    return features["sentence_embedding"]


def stored(folder: Path, modules: list[Any]) -> Path:
    """Write the modules as SentenceTransformer.save does, behind a transformer without files."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": KIND + "Transformer"}]
    for i, module in enumerate(modules, start=1):
        path = f"{i}_{type(module).__name__}"
        (folder / path).mkdir(parents=True)
        module.save(str(folder / path))
        listed.append({"idx": i, "name": str(i), "path": path, "type": KIND + type(module).__name__})
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("mode", [*MODES, ("cls", "max")])
def test_every_mode_is_sentence_transformers_own(tmp_path: Path, mode: Any) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    modules = [Theirs(4, pooling_mode=mode)]
    pooling = pooling_of(stored(tmp_path, modules))
    found, expected = pooling(*batch()), theirs(modules)
    assert torch.allclose(found, expected, atol=1e-6)
    if mode != "mean":
        assert not torch.allclose(found[:, :4], MEAN(*batch()), atol=1e-2)
    assert torch.allclose(pooled(*batch(), pooling), nn.functional.normalize(expected, dim=-1), atol=1e-6)


def test_flags_of_earlier_releases(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    folder = stored(tmp_path, [Theirs(4)])
    flags = {"word_embedding_dimension": 4, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    assert pooling_of(folder).modes == ("cls",)


def test_what_follows_the_pooling(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    modules = [
        Theirs(4, pooling_mode="lasttoken"),
        Dense(4, 6, activation_function=nn.Tanh()),
        Dense(6, 6, bias=False, activation_function=nn.Identity(), use_residual=True),
        LayerNorm(6),
        Dropout(0.5).eval(),
        Normalize(),
        Dense(6, 3, activation_function=nn.GELU(), use_residual=True),
    ]
    folder = stored(tmp_path, modules)
    assert torch.allclose(pooling_of(folder)(*batch()), theirs(modules), atol=1e-6)


def test_gradients_reach_the_tokens_and_not_the_modules(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    pooling = pooling_of(stored(tmp_path, [Theirs(4, pooling_mode="max"), Dense(4, 2)]))
    hidden, mask = batch()
    pooled(hidden.requires_grad_(), mask, pooling)[:, 0].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


def test_the_first_description_counts(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    plain, cls = tmp_path / "plain", stored(tmp_path / "cls", [Theirs(4, pooling_mode="cls")])
    last = stored(tmp_path / "last", [Theirs(4, pooling_mode="lasttoken")])
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    assert pooling_of(plain) == MEAN == Pooling()
    assert pooling_of(plain, cls).modes == ("cls",)
    assert pooling_of(last, cls).modes == ("lasttoken",)
    assert pooling_of(nn.Linear(2, 2)) == MEAN


def test_a_text_is_no_longer_than_the_encoder_says(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    folder = stored(tmp_path, [Theirs(4)])
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 128, "do_lower_case": false}')
    assert pooling_of(folder).max_length == 128


@pytest.mark.parametrize(
    ("types", "said"),
    [
        (["sentence_transformers.models.WeightedLayerPooling"], "WeightedLayerPooling"),
        (["mine.Pooling"], "Pooling, which nogemm cannot follow"),
        ([], "names no Pooling"),
    ],
)
def test_what_cannot_be_followed_is_named(tmp_path: Path, types: list[str], said: str) -> None:
    listed = [{"path": f"{i}_M" if i else "", "type": kind} for i, kind in enumerate([KIND + "Transformer", *types])]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(ConfigError, match=said):
        pooling_of(tmp_path)


def test_settings_that_cannot_be_followed_are_named(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    folder = stored(tmp_path, [Theirs(4), Dense(4, 2)])
    settings = folder / "2_Dense" / "config.json"
    before = json.loads(settings.read_text())
    settings.write_text(json.dumps(before | {"activation_function": "os.system"}))
    with pytest.raises(ConfigError, match=r"os\.system"):
        pooling_of(folder)
    settings.write_text(json.dumps(before))
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        pooling_of(folder)
