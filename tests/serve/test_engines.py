"""What workers compute, without a server: exports, pooling, rerankers, decoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nogemm
import people
from nogemm.errors import CheckpointError, ConfigError
from nogemm.models.loading import load_both, load_tokenizer
from nogemm.serve.decoder_engine import Asked, DecoderEngine
from nogemm.serve.kind import Kind, kind_of
from nogemm.serve.text_engines import TextEngine


def engine(folder: Path, **more: Any) -> TextEngine:
    return TextEngine(kind_of(str(folder)), "fp32", None, 1, more.get("max_length"))


def rows(folder: Path, texts: list[str], pairs: list[str] | None = None) -> list[dict[str, Any]]:
    found = load_tokenizer(folder)(texts, pairs)
    return [{name: found[name][i] for name in found} for i in range(len(texts))]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted sentence encoder: the largest number of all tokens, then a layer."""
    from sentence_transformers.sentence_transformer.modules import Dense

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("engines")
    dense = Dense(16, 8)
    source = people.sentence_encoder(folder / "encoder", dense, mode="max")
    people.edit(source / "sentence_bert_config.json", max_seq_length=30)
    assert people.run("convert", source, folder / "converted", *people.SAME) == 0
    return folder / "converted"


def test_an_export_keeps_how_its_states_are_pooled(encoder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_both(encoder)
    nogemm.export(model, tmp_path / "out", tokenizer=tokenizer, rest="float")
    found = engine(tmp_path / "out")
    assert (found.max_length, found.width, kind_of(str(tmp_path / "out")).engine) == (30, 8, "openvino")
    wanted = people.encoded(encoder)
    assert np.abs(found.run(rows(encoder, people.TEXTS)) - wanted).max() < 0.02  # OpenVINO chooses bfloat16
    assert np.abs(engine(encoder).run(rows(encoder, people.TEXTS)) - wanted).max() < 1e-5
    (tmp_path / "out" / "modules.json").unlink()
    assert engine(tmp_path / "out").width == 16  # without its description an export would be pooled otherwise


def test_a_live_sentence_transformer_keeps_it_too(encoder: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    live = SentenceTransformer(str(encoder), device="cpu").eval()
    nogemm.export(live, tmp_path / "out", tokenizer=live.tokenizer, rest="float")
    found = engine(tmp_path / "out")
    assert (found.max_length, found.width) == (30, 8)
    assert np.abs(found.run(rows(encoder, people.TEXTS)) - people.encoded(encoder)).max() < 0.02


@pytest.mark.parametrize("activation", [None, "torch.nn.modules.linear.Identity"])
def test_a_reranker_scores_as_its_cross_encoder(tmp_path: Path, activation: str | None) -> None:
    from sentence_transformers import CrossEncoder

    folder = people.reranker(tmp_path / "reranker")
    if activation is not None:
        people.edit(folder / "config.json", sentence_transformers={"activation_fn": activation})
    queries = ["fast search"] * len(people.TEXTS)
    wanted = CrossEncoder(str(folder), device="cpu").predict(list(zip(queries, people.TEXTS, strict=True)))
    found = engine(folder).run(rows(folder, queries, people.TEXTS))
    assert found.shape == (len(people.TEXTS), 1)
    assert np.abs(found[:, 0] - wanted).max() < 1e-5
    other = engine(folder).run(rows(folder, people.TEXTS, queries))
    assert np.abs(other[:, 0] - wanted).max() > 1e-4  # the order of a pair counts
    people.edit(folder / "config.json", sentence_transformers={"activation_fn": "torch.nn.ReLU"})
    with pytest.raises(ConfigError, match="neither Sigmoid nor Identity"):
        engine(folder)


def test_a_classifier_of_several_classes_is_no_reranker(tmp_path: Path) -> None:
    folder = people.bert(tmp_path / "classes", "BertForSequenceClassification")
    assert kind_of(str(folder)).task == "rerank"
    with pytest.raises(ConfigError, match="one logit for a pair of texts, this model has 2"):
        engine(folder)


def test_an_exported_decoder_gives_the_tokens_of_the_torch_model(tmp_path: Path) -> None:
    folder = people.gpt2(tmp_path / "gpt2")
    model, tokenizer = load_both(folder)
    nogemm.convert_head(model)
    nogemm.export_decoder(model, tmp_path / "out", body="float", rows="fp32", tokenizer=tokenizer)
    kind = kind_of(str(tmp_path / "out"))
    assert (kind.task, kind.engine) == ("generate", "openvino")
    ids = tokenizer("a fast").input_ids
    asked = Asked(ids=ids, new_tokens=10)

    def texts(decoder: DecoderEngine, tokens: int | None = None) -> tuple[str, list[str]]:
        parts: list[str] = []
        ended = decoder.run(asked, lambda text, count: parts.append(text), lambda: len(parts) == tokens)
        return ended, parts

    exported, torch_own = (DecoderEngine(one, "fp32", None, 1) for one in (kind, kind_of(str(folder))))
    whole = texts(exported)
    assert whole == texts(torch_own)
    assert whole[0] == "length"
    for decoder in (exported, torch_own):
        assert texts(decoder, 3) == ("cancelled", whole[1][:3])
        assert texts(decoder) == whole
    with pytest.raises(ConfigError, match="top_p is not offered"):
        exported.run(Asked(ids=ids, new_tokens=1, temperature=1.0, top_p=0.5), lambda *piece: None, lambda: False)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "is no record of an export"),
        ("[]", "is no record of an export"),
        ('{"model": "../x.xml", "extension": "l.so"}', r"names \.\./x\.xml, \.\./x\.bin, outside of the folder"),
        ('{"model": "m.xml", "extension": "/lib/l.so"}', "names /lib/l.so, outside of the folder"),
    ],
)
def test_a_record_that_leads_elsewhere_is_refused(tmp_path: Path, record: str, said: str) -> None:
    (tmp_path / "nogemm_export.json").write_text(record)
    with pytest.raises(CheckpointError, match=said):
        kind_of(str(tmp_path))


def test_a_masked_language_model_is_exported_for_other_uses(tmp_path: Path) -> None:
    for name in ("m.xml", "m.bin", "l.so"):
        (tmp_path / name).touch()
    record = {"model": "m.xml", "extension": "l.so", "output": "logits"}
    (tmp_path / "nogemm_export.json").write_text(json.dumps(record))
    (tmp_path / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}')
    with pytest.raises(ConfigError, match="gives logits of every token"):
        kind_of(str(tmp_path))
    assert isinstance(kind_of(str(people.gpt2(tmp_path / "gpt2"))), Kind)
