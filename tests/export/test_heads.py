"""Models with heads, and inputs beyond tokens and mask: classifiers answer as in torch, pairs included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tiny_export import TEXTS, WORDS

import nogemm
from nogemm.convert.sites import sites
from nogemm.export import openvino_host
from nogemm.export.samples import graph_inputs

_SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 16, "n_inner": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
CONFIGS = {
    "bert": lambda **more: tf.BertConfig(**_SIZES, **more),
    "roberta": lambda **more: tf.RobertaConfig(**_SIZES, type_vocab_size=1, **more),
    "distilbert": lambda **more: tf.DistilBertConfig(
        dim=16, hidden_dim=32, n_layers=2, n_heads=2, vocab_size=len(WORDS), **more
    ),
    "modernbert": lambda **more: tf.ModernBertConfig(
        **_SIZES, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3, **more
    ),
    "gpt2": lambda **more: tf.GPT2Config(
        **_GPT2, vocab_size=len(WORDS), pad_token_id=0, bos_token_id=2, eos_token_id=3, **more
    ),
}
LOOKUP = nogemm.LookupConfig(tables=8, bits=4, projection=nogemm.BHConfig(rounds=2, block=16))


def build(family: str, head: str, **more: Any) -> Any:
    """Make a tiny model whose first FFN is a lookup and whose second stays dense."""
    torch.manual_seed(0)
    model = getattr(tf, f"AutoModel{head and 'For'}{head}").from_config(CONFIGS[family](**more)).eval()
    names = [site.name for site in sites(model)]
    nogemm.convert(model, {names[0]: LOOKUP, names[1]: nogemm.DenseConfig()})
    for layer in nogemm.converted(model).values():
        layer.fitted = "distilled"
    return model


def encoded(tokenizer: Any, texts: list[str], others: list[str] | None) -> Any:
    return tokenizer(texts, others, padding=True, return_tensors="pt")


def answers(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run an export in this process, fed with all that it takes."""
    graph = openvino_host.load(folder / "openvino_model.xml", folder / "libnogemm_openvino.so")
    model = openvino_host.shared_core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [x.get_any_name() for x in model.inputs]
    assert names == json.loads((folder / "nogemm_export.json").read_text())["inputs"]
    return torch.from_numpy(model({name: inputs[name].numpy() for name in names})[0].copy())


@pytest.mark.parametrize(
    ("family", "head"),
    [
        *((family, "SequenceClassification") for family in CONFIGS),
        ("distilbert", "TokenClassification"),
        ("modernbert", "MaskedLM"),
    ],
)
def test_heads_answer_as_in_torch_whatever_the_shape(family: str, head: str, tokenizer: Any, tmp_path: Path) -> None:
    model = build(family, head)
    report = nogemm.export(model, tmp_path / "out", rest="float", tokenizer=tokenizer, calibration=TEXTS)
    assert report.output == "logits"
    assert report.cosine > 0.9999
    for texts, others in ((TEXTS[:3], TEXTS[3:6]), (TEXTS[5:6], None)):
        full = encoded(tokenizer, texts, others)
        taken = {name: full[name] for name in graph_inputs(model, tokenizer)}
        with torch.no_grad():
            expected = model(**taken).logits
        found = answers(tmp_path / "out", full)
        seen = full["attention_mask"].bool() if expected.dim() == 3 else ...
        assert found.shape == expected.shape
        # Sums of some dozen numbers in another order; a token whose hash lies on an edge would be off by far more.
        assert torch.allclose(found[seen], expected[seen], atol=1e-4)


def test_a_reranker_of_one_logit_is_held_by_its_size(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The cosine of two single numbers is 1 or -1: it would have seen nothing."""
    model = build("bert", "SequenceClassification", num_labels=1)
    report = nogemm.export(model, tmp_path / "out", rest="float", tokenizer=tokenizer, calibration=TEXTS)
    assert report.worst > 0.9999
    convert = openvino_host.convert

    def spoilt(host: Any, *others: Any) -> Any:
        graph = convert(host, *others)
        head = host.model.classifier
        head.weight = torch.nn.Parameter(1.3 * head.weight, requires_grad=False)  # in place the graph would see it, too
        return graph

    monkeypatch.setattr(openvino_host, "convert", spoilt)
    with pytest.raises(nogemm.NogemmError, match=r"agreement 0\.9\d+, 0\.999 needed; worst text"):
        nogemm.export(model, tmp_path / "other", rest="float", tokenizer=tokenizer, calibration=TEXTS)


def test_types_of_tokens_are_an_input(tokenizer: Any, tmp_path: Path) -> None:
    model = build("bert", "")
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.mul_(30)
    report = nogemm.export(model, tmp_path / "out", rest="float", tokenizer=tokenizer, calibration=TEXTS)
    assert report.inputs == ("input_ids", "attention_mask", "token_type_ids")
    assert '"token_type_ids": types' in (tmp_path / "out" / "README.md").read_text()
    inputs = encoded(tokenizer, TEXTS[:2], TEXTS[2:4])
    found = answers(tmp_path / "out", inputs)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        assert torch.allclose(found[mask], model(**inputs).last_hidden_state[mask], atol=1e-4)
        without = model(**{name: inputs[name] for name in inputs if name != "token_type_ids"}).last_hidden_state
    assert not torch.allclose(found[mask], without[mask], atol=0.1)


def test_inputs_follow_the_tokenizer_else_the_config(tokenizer: Any, monkeypatch: Any) -> None:
    assert graph_inputs(build("bert", "")) == ("input_ids", "attention_mask", "token_type_ids")
    assert graph_inputs(build("bert", "", type_vocab_size=1)) == ("input_ids", "attention_mask")
    # Types of one kind are all 0, which RoBERTa takes without being told.
    assert graph_inputs(build("roberta", ""), tokenizer) == ("input_ids", "attention_mask")
    assert graph_inputs(build("distilbert", ""), tokenizer) == ("input_ids", "attention_mask")
    monkeypatch.setattr(tokenizer, "model_input_names", ["input_ids", "attention_mask", "position_ids"])
    with pytest.raises(nogemm.ConfigError, match="tokenizer makes position_ids for BertModel; a host is given only"):
        graph_inputs(build("bert", ""), tokenizer)


def test_a_decoder_that_classifies_needs_a_padding_token(tokenizer: Any, tmp_path: Path) -> None:
    model = build("gpt2", "SequenceClassification")
    model.config.pad_token_id = None
    with pytest.raises(nogemm.ConfigError, match="GPT2ForSequenceClassification takes batches only with a padding tok"):
        nogemm.export(model, tmp_path / "out")
    report = nogemm.export(model, tmp_path / "out", rest="float", tokenizer=tokenizer, calibration=TEXTS)
    assert report.cosine > 0.9999  # texts of other lengths: each answer is read at the text's own last token
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0
    assert model.config.pad_token_id is None


@pytest.mark.parametrize(
    ("dtype", "rest"), [(torch.bfloat16, "float"), (torch.bfloat16, "int8"), (torch.float16, "float")]
)
def test_half_precision_checkpoints_are_computed_in_float32(
    dtype: torch.dtype, rest: str, tokenizer: Any, tmp_path: Path
) -> None:
    model = build("bert", "").to(dtype)
    report = nogemm.export(model, tmp_path / "out", rest=rest, tokenizer=tokenizer, calibration=TEXTS)
    inputs = encoded(tokenizer, TEXTS[:4], None)
    found = answers(tmp_path / "out", inputs)
    assert found.dtype == torch.float32
    with torch.no_grad():
        expected = model.float()(**inputs).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)[inputs["attention_mask"].bool()]
    assert cosine.min() > (0.9999 if rest == "float" else 0.9)
    assert report.cosine > (0.9999 if rest == "float" else 0.98)
