"""What a converted head takes in memory, the way back to a dense one, and weights that cannot be converted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf

import decoders
import nogemm
from nogemm import ConfigError, HeadConfig
from nogemm.convert.head import find_head
from nogemm.heads import codes_bytes, make_codes
from nogemm.testing.compare import check_equal


@pytest.mark.parametrize("shape", [(64, 24), (65, 8), (307, 25), (100, 256)])
@pytest.mark.parametrize(("leading", "sketch"), [(32, 128), (0, 1), (7, 9), (300, 300)])
def test_bytes_of_codes_are_counted_before_they_are_made(shape: tuple[int, int], leading: int, sketch: int) -> None:
    made = make_codes(torch.randn(shape), None, None, leading, sketch)
    assert codes_bytes(*shape, leading, sketch) == made.bytes
    assert codes_bytes(shape[0] + 64, shape[1], leading, sketch) != made.bytes, "the comparison can fail"


@pytest.mark.parametrize("kind", ["llama", "llama tied", "phi with a bias"])
def test_the_report_names_what_is_shared(kind: str) -> None:
    model = decoders.make(kind)
    head = nogemm.convert_head(model, HeadConfig(mode="deferred"), [{"input_ids": decoders.prompts(2)}])
    report = nogemm.head_report(model)
    assert report.tied == (kind == "llama tied")
    assert report.codes_bytes == head.codes().bytes
    assert report.moment_bytes == 4 * 24 * 24
    assert report.weight_bytes == 4 * decoders.V * (24 + (kind == "phi with a bias"))
    assert report.search_rows == decoders.V, "no more than there are"
    assert report.to_dict()["added_bytes"] == report.codes_bytes + report.moment_bytes
    assert ("shared with the embedding" in str(report)) == (kind == "llama tied")
    assert "mode='deferred', codes=" in repr(model)
    bare = decoders.make(kind)
    nogemm.convert_head(bare)
    assert "fitted to the weights alone" in str(nogemm.head_report(bare))
    with pytest.raises(ConfigError, match="the model's head is dense"):
        nogemm.head_report(decoders.make(kind))


@pytest.mark.parametrize("kind", ["llama", "llama tied", "phi with a bias", "gpt2"])
def test_a_head_is_dense_again(kind: str, tmp_path: Path) -> None:
    model, ids = decoders.make(kind), decoders.prompts(2)
    dense, expected = model.get_output_embeddings(), model(ids).logits
    nogemm.convert_head(model, data=[{"input_ids": ids}])
    nogemm.generate(model, ids, 3)
    back = nogemm.restore_head(model)
    assert model.get_output_embeddings() is back
    assert type(back) is torch.nn.Linear
    assert back.weight is dense.weight
    assert back.bias is dense.bias
    assert find_head(model) is None
    check_equal("logits", model(ids).logits, expected)
    assert (model.get_input_embeddings().weight is back.weight) == bool(model.config.tie_word_embeddings)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert "needs `import nogemm`" not in (tmp_path / "config.json").read_text()
    check_equal("saved", type(model).from_pretrained(tmp_path).eval()(ids).logits, expected)
    head = nogemm.convert_head(model)  # and forth
    assert head.weight is dense.weight
    nogemm.save(model, tmp_path)
    assert find_head(type(model).from_pretrained(tmp_path)) is not None


def test_a_masked_models_head_is_dense_again() -> None:
    torch.manual_seed(0)
    model = tf.BertForMaskedLM(tf.BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    dense = model.get_output_embeddings()
    nogemm.convert_head(model)
    back = nogemm.restore_head(model)
    assert back.weight is dense.weight is model.get_input_embeddings().weight
    assert back.bias is dense.bias is model.cls.predictions.bias


def test_converted_ffns_stay_when_the_head_goes(tmp_path: Path) -> None:
    model, ids = decoders.make("llama tied"), decoders.prompts(2)
    nogemm.convert(model, nogemm.DenseConfig(hidden=48, activation="silu"))
    nogemm.convert_head(model)
    nogemm.restore_head(model)
    expected = model(ids).logits
    nogemm.save(model, tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert find_head(again) is None
    assert len(nogemm.converted(again)) == 2
    check_equal("logits", again(ids).logits, expected)
    nogemm.convert_head(model)
    nogemm.pack(model)
    nogemm.restore_head(model)
    with pytest.raises(nogemm.PackedError):
        model.save_pretrained(tmp_path)


def test_what_cannot_go_back_is_named() -> None:
    model = decoders.make("llama")
    with pytest.raises(ConfigError, match="restore_head: the head of this LlamaForCausalLM is not converted"):
        nogemm.restore_head(model)
    with pytest.raises(ConfigError, match="restore_head: expected a model, got 'gpt2'"):
        nogemm.restore_head("gpt2")  # type: ignore[arg-type]
    head = nogemm.convert_head(model)
    head.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="has forward hooks"):
        nogemm.restore_head(model)
    assert find_head(model) is head


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_at_conversion(bad: float) -> None:
    model = decoders.make("phi with a bias")
    with torch.no_grad():
        model.lm_head.weight[[71, 200], [3, 4]] = bad
    with pytest.raises(ConfigError, match=r"convert_head: .* weights that are not finite, in row 71 and in 1 more"):
        nogemm.convert_head(model)
    with torch.no_grad():
        model.lm_head.weight[[71, 200]] = 0
        model.lm_head.bias[9] = bad
    with pytest.raises(ConfigError, match=r"biases that are not finite, in row 9$"):
        nogemm.convert_head(model)
    assert find_head(model) is None
    with torch.no_grad():
        model.lm_head.bias[9] = 0
    head = nogemm.convert_head(model)
    with torch.no_grad():
        head.weight[5, 5] = bad
    with pytest.raises(ConfigError, match=r"make_codes: .* not finite, in row 5$"):
        head.choose(torch.randn(2, 24))


def test_codes_are_made_on_the_cpu_alone() -> None:
    weight = torch.randn(9, 8)
    for args, name in (
        ((weight.to("meta"),), "weight"),
        ((weight, torch.zeros(9, device="meta")), "bias"),
        ((weight, None, torch.eye(8, device="meta")), "moment"),
    ):
        with pytest.raises(ConfigError, match=f"made and read on the CPU, {name} is on meta; move the model there"):
            make_codes(*args)  # type: ignore[arg-type]
