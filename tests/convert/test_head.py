"""convert_head: one copy of the weights, saved and loaded, changed and copied; what cannot be converted is named."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import decoders
import nogemm
from nogemm import CheckpointError, ConfigError, HeadConfig
from nogemm.convert.head import find_head
from nogemm.heads import HireHead
from nogemm.testing.compare import check_equal


def masked() -> Any:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=99,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.5,
    )
    return tf.BertForMaskedLM(config).eval()


def texts() -> list[Any]:
    return [{"input_ids": decoders.prompts(3, 9)} for _ in range(2)]


@pytest.mark.parametrize("kind", decoders.DECODERS)
def test_logits_and_memory_stay_as_they_are(kind: str) -> None:
    model, ids = decoders.make(kind), decoders.prompts(2)
    before = model(ids).logits
    parameters = {id(parameter) for parameter in model.parameters()}
    head = nogemm.convert_head(model, HeadConfig(leading=8), texts())
    assert {id(parameter) for parameter in model.parameters()} == parameters, "one copy of the weights"
    assert find_head(model) is head
    check_equal("logits", model(ids).logits, before)
    tied = model.get_input_embeddings().weight is head.weight
    assert tied == bool(model.config.tie_word_embeddings)
    model(ids).logits.sum().backward()
    assert head.weight.grad is not None
    assert head.codes().bytes > 0


@pytest.mark.parametrize("kind", [*decoders.DECODERS, "bert"])
@pytest.mark.parametrize("fitted", [False, True])
def test_a_saved_head_comes_back(kind: str, fitted: bool, tmp_path: Path) -> None:
    model = masked() if kind == "bert" else decoders.make(kind)
    ids = decoders.prompts(2) % (99 if kind == "bert" else decoders.V)
    nogemm.convert_head(model, HeadConfig(leading=8), [{"input_ids": ids}] if fitted else None)
    nogemm.save(model, tmp_path / "model")
    stored = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert stored["head"]["config"]["leading"] == 8
    again = type(model).from_pretrained(tmp_path / "model").eval()
    head, own = find_head(again), find_head(model)
    assert isinstance(head, HireHead)
    assert own is not None
    assert head.config == own.config
    check_equal("logits", again(ids).logits, model(ids).logits)
    for name, one, other in zip(("project", "codes"), head.codes().tensors(), own.codes().tensors(), strict=False):
        check_equal(name, one, other)
    assert (again.get_input_embeddings().weight is head.weight) == bool(model.config.tie_word_embeddings)
    if kind not in ("bert",):
        check_equal("tokens", nogemm.generate(again, ids, 8), nogemm.generate(model, ids, 8))
    base = tf.AutoModel.from_pretrained(tmp_path / "model")
    assert find_head(base) is None
    again.save_pretrained(tmp_path / "second")
    assert find_head(type(model).from_pretrained(tmp_path / "second")) is not None


def test_ffns_and_head_together(tmp_path: Path) -> None:
    model, ids = decoders.make("llama tied"), decoders.prompts(2)
    nogemm.convert(model, nogemm.DenseConfig(hidden=48, activation="silu"))
    nogemm.convert_head(model, data=texts())
    expected = nogemm.generate(model, ids, 10)
    nogemm.save(model, tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    check_equal("tokens", nogemm.generate(again, ids, 10), expected)
    nogemm.pack(again)
    check_equal("packed", nogemm.generate(again, ids, 10), expected)


def test_a_head_alone_is_packed_and_still_saved(tmp_path: Path) -> None:
    model, ids = decoders.make("llama"), decoders.prompts()
    with pytest.raises(ConfigError, match="no converted FFN"):
        nogemm.pack(model)
    head = nogemm.convert_head(model)
    nogemm.pack(model)
    assert head._codes is not None
    nogemm.save(model, tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    check_equal("tokens", nogemm.generate(again, ids, 5), nogemm.generate(model, ids, 5))


def test_a_tied_embedding_that_is_edited_is_noticed() -> None:
    model, ids = decoders.make("llama tied"), decoders.prompts(2)
    nogemm.convert_head(model)
    nogemm.generate(model, ids, 3)
    for edit in (
        lambda weight: weight.mul_(torch.randn(decoders.V, 1)),
        lambda weight: weight[7].copy_(40 * weight[9]),
    ):
        with torch.no_grad():
            edit(model.get_input_embeddings().weight)
        states = torch.randn(50, 24)
        logits = states.double() @ model.lm_head.weight.double().T
        check_equal("tokens", model.lm_head.choose(states).token, logits.argmax(1))
    model.lm_head.weight = nn.Parameter(torch.randn(decoders.V, 24))
    logits = states.double() @ model.lm_head.weight.double().T
    check_equal("another matrix", model.lm_head.choose(states).token, logits.argmax(1))
    model.double().float()
    check_equal("after a round trip", model.lm_head.choose(states).token, logits.argmax(1))


@pytest.mark.parametrize("kind", ["llama", "phi with a bias"])
def test_edits_that_torch_does_not_count_are_noticed_by_generate(kind: str) -> None:
    model, ids = decoders.make(kind), decoders.prompts(2)
    nogemm.convert_head(model, data=texts())
    nogemm.generate(model, ids, 2)
    edits = [
        lambda head: head.weight.data.add_(torch.randn(decoders.V, 24)),
        lambda head: head.weight.data.copy_(head.weight.data.flip(0)),
        lambda head: head.weight.data[5].mul_(50),
        lambda head: head.weight.detach().numpy().__setitem__(7, 9.0),
    ]
    if kind != "llama":
        edits.append(lambda head: head.bias.data[11].add_(1000))
    for edit in edits:
        edit(model.lm_head)
        with torch.no_grad():
            expected = ids
            for _ in range(5):
                expected = torch.cat((expected, model(expected).logits[:, -1].argmax(1, keepdim=True)), 1)
        check_equal("tokens", nogemm.generate(model, ids, 5), expected)


def test_dense_weights_load_into_a_converted_model() -> None:
    dense, model = decoders.make("llama"), decoders.make("llama")
    with torch.no_grad():
        dense.lm_head.weight.normal_()
    head = nogemm.convert_head(model, data=texts())
    moment = None if head.moment is None else head.moment.clone()
    model.load_state_dict(dense.state_dict())
    assert head.moment is not None
    assert moment is not None
    check_equal("moment", head.moment, moment)
    states = torch.randn(9, 24)
    check_equal("tokens", head.choose(states).token, (states.double() @ dense.lm_head.weight.double().T).argmax(1))


def test_resizing_the_embeddings_before_conversion_and_tied_ones_after() -> None:
    model = decoders.make("llama tied")
    nogemm.convert_head(model)
    nogemm.generate(model, decoders.prompts(), 2)
    model.resize_token_embeddings(decoders.V + 13)
    head = find_head(model)
    assert head is not None
    assert head.out_features == decoders.V + 13
    states = torch.randn(9, 24)
    check_equal("tokens", head.choose(states).token, (states.double() @ head.weight.double().T).argmax(1))


def test_copies_and_pickles_have_heads_of_their_own() -> None:
    model, ids = decoders.make("gpt2"), decoders.prompts()
    nogemm.convert_head(model, data=texts())
    expected = nogemm.generate(model, ids, 6)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        check_equal("tokens", nogemm.generate(again, ids, 6), expected)
    assert len(pickle.dumps(model)) < 1.2 * len(pickle.dumps(decoders.make("gpt2")))


def test_what_cannot_be_converted_is_named() -> None:
    model = decoders.make("llama")
    bare = tf.AutoModel.from_config(model.config)
    with pytest.raises(ConfigError, match="LlamaModel has no vocabulary head"):
        nogemm.convert_head(bare)
    with pytest.raises(ConfigError, match="expected a model, got 'gpt2'"):
        nogemm.convert_head("gpt2")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="expected a HeadConfig"):
        nogemm.convert_head(model, nogemm.DenseConfig())  # type: ignore[arg-type]
    for data, words in (
        ([], "data gave no token to the head"),
        ({"input_ids": torch.ones(1, 2)}, "must be a list of mappings, not one mapping"),
        (5, "data must be texts or mappings of tensors, got 5"),
        ([None], "among them is None"),
        (torch.ones(2, 3), "among them is tensor"),
        ([{"input_ids": [[1, 2]]}], "among them is {'input_ids'"),
        ([{"input_ids": torch.tensor([[1, 999]])}], "the model cannot run on the data"),
    ):
        with pytest.raises(ConfigError, match=words):
            nogemm.convert_head(model, data=data)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"weights of torch\.float64, not float32, bfloat16 or float16"):
        nogemm.convert_head(decoders.make("llama").double())
    with pytest.raises(
        ConfigError, match=r"HeadConfig: mode must be one of exact, deferred, high_recall, fast, got .*'quick'"
    ):
        HeadConfig(mode="quick")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="HeadConfig: leading must be an integer at least 0"):
        HeadConfig(leading=-1)
    assert find_head(model) is None
    quantised = torch.ao.quantization.quantize_dynamic(decoders.make("llama"), {nn.Linear})
    with pytest.raises(ConfigError, match="not a plain linear layer"):
        nogemm.convert_head(quantised)
    nogemm.convert_head(model)
    with pytest.raises(ConfigError, match="converted already"):
        nogemm.convert_head(model)


def test_a_broken_description_is_an_error(tmp_path: Path) -> None:
    model = decoders.make("llama")
    nogemm.convert_head(model, data=texts())
    nogemm.save(model, tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    weights = tmp_path / "model.safetensors"
    whole = load_file(weights)
    with safe_open(weights, framework="pt") as opened:
        metadata = opened.metadata()
    save_file({name: value for name, value in whole.items() if "moment" not in name}, weights, metadata)
    with pytest.raises(CheckpointError, match=r"lacks weights .* the head: moment"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    nogemm.save(model, tmp_path)
    good = json.loads(file.read_text())
    for head, words in (
        ({"config": {"kind": "vocabulary", "colour": 1}, "moment": True}, "colour"),
        ({"moment": True}, "config.json, head"),
        ({"config": {"kind": "other"}}, "other"),
    ):
        broken = copy.deepcopy(good)
        broken["quantization_config"]["head"] = head
        file.write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=words):
            tf.AutoModelForCausalLM.from_pretrained(tmp_path)
