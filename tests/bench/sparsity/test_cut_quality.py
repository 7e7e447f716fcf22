"""What a model is worth with its neurons cut: the cut is a HireFFN's, the measures are those that others compute."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nogemm
import people
from decoders import make
from nogemm.bench.sparsity.layer import kept_count
from nogemm.bench.sparsity.quality import ADDED, Judge, cut, judge_of
from nogemm.bench.sparsity.samples import read_samples
from nogemm.models.embed import masked_losses


def tiny(kind: str) -> Any:
    import transformers as tf

    common: dict[str, Any] = {"vocab_size": 307, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "opt":
        config = tf.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=24, max_position_embeddings=40, init_std=0.5)
        return tf.OPTForCausalLM(config).eval()
    if kind == "phi3 fused":
        more: dict[str, Any] = {"intermediate_size": 48, "initializer_range": 0.5, "pad_token_id": 0, "eos_token_id": 1}
        return tf.Phi3ForCausalLM(tf.Phi3Config(**common, **more)).eval()
    return make(kind)


def ids(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["opt", "llama", "gpt2", "phi3 fused"])
def test_a_cut_model_answers_as_one_of_layers_that_miss_nothing(kind: str) -> None:
    model = tiny(kind)
    converted = copy.deepcopy(model)
    keep = 0.25
    nogemm.convert(converted, nogemm.HireConfig(keep=keep, oversample=1 / keep))  # every neuron is a candidate
    sites = nogemm.sites(model)
    with torch.no_grad():
        dense, wanted = model(ids()).logits, converted(ids()).logits
        with cut(sites, lambda site: kept_count(site.hidden, keep)):
            ours = model(ids()).logits
        with cut(sites, lambda site: kept_count(site.hidden, keep) + 1):
            other = model(ids()).logits
        again = model(ids()).logits
    size = float(wanted.abs().amax())
    assert float((ours - wanted).abs().amax()) < 1e-4 * size
    assert float((other - wanted).abs().amax()) > 1e-3 * size  # a neuron more is seen
    assert torch.equal(dense, again)


def test_the_other_ranking_takes_what_neurons_add() -> None:
    model = tiny("llama")
    site = nogemm.sites(model)[0]
    seen: list[Tensor] = []
    h = torch.randn(1, 48)
    h[0, 3], h[0, 5] = 9.0, -8.0
    rows = site.weights()["down.weight"]  # a view: the model's own numbers are written
    rows.copy_(torch.eye(48)[:24])
    rows[:, 5] *= 100
    with torch.no_grad(), cut([site], lambda _: 1, ADDED):
        handle = site.down.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        site.down(h)
        handle.remove()
    assert torch.nonzero(seen[0]).tolist() == [[0, 5]]  # the rows of 24 and on are 0 and add nothing


def judged(model: Any, data: Any, tokenizer: Any = None, tokens: int = 8) -> Judge:
    found = judge_of(model, read_samples(model, data, tokenizer, tokens), tokenizer, seed=0)
    assert isinstance(found, Judge)
    return found


def test_perplexity_is_exp_of_the_models_own_loss() -> None:
    model = tiny("opt")
    sample = {"input_ids": ids(1, 12), "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    judge = judged(model, [sample])
    with torch.no_grad():
        loss = model(**sample, labels=sample["input_ids"]).loss
    assert judge.measure == "perplexity"
    assert judge.tokens == 11
    assert judge.dense == pytest.approx(math.exp(float(loss)), rel=1e-5)
    padded = {"input_ids": torch.cat([sample["input_ids"], ids(1, 4)], 1)}
    padded["attention_mask"] = torch.tensor([[1] * 12 + [0] * 4])
    assert judged(model, [padded]).dense == pytest.approx(judge.dense, rel=1e-5)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert judge.value() != pytest.approx(judge.dense, rel=1e-3)


def test_a_masked_model_is_judged_at_the_same_masks(tmp_path: Path) -> None:
    import transformers as tf

    folder = people.bert(tmp_path / "bert", "BertForMaskedLM")
    model = tf.AutoModelForMaskedLM.from_pretrained(folder).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in people.TEXTS)
    judge = judged(model, people.TEXTS, tokenizer, tokens)
    sums, counts = masked_losses(model, tokenizer, people.TEXTS, seed=0)
    assert judge.measure == "pseudo-perplexity"
    assert judge.tokens == counts.sum()
    assert judge.dense == pytest.approx(math.exp(sums.sum() / counts.sum()), rel=1e-5)
    assert judge.value() == pytest.approx(judge.dense, rel=1e-6)


def test_an_encoder_agrees_with_itself_and_less_when_cut(tmp_path: Path) -> None:
    import transformers as tf

    folder = people.bert(tmp_path / "bert")
    model = tf.AutoModel.from_pretrained(folder).eval()
    judge = judged(model, people.TEXTS, tf.AutoTokenizer.from_pretrained(folder), 20)
    assert (judge.measure, judge.higher) == ("agreement", True)
    assert judge.dense == pytest.approx(1, abs=1e-6)
    sites = nogemm.sites(model)
    with cut(sites, lambda site: site.hidden):
        assert judge.value() == pytest.approx(1, abs=1e-5)
    with cut(sites, lambda site: 1):
        assert judge.value() < 0.999


@pytest.mark.parametrize(
    ("kind", "said"), [("masked", "mask token"), ("both", "encoder and a decoder"), ("bare", "no vocabulary head")]
)
def test_a_model_without_a_measure_says_why(kind: str, said: str) -> None:
    import transformers as tf

    config = tf.BertConfig(**people.SMALL)
    models: dict[str, Any] = {"masked": lambda: tf.BertForMaskedLM(config), "bare": lambda: tf.BertModel(config)}
    t5 = tf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=13)
    models["both"] = lambda: tf.T5ForConditionalGeneration(t5)
    model = models[kind]().eval()
    sample = {"input_ids": torch.randint(1, 13, (2, 8))}
    found = judge_of(model, read_samples(model, [sample], None, 8), None, seed=0)
    assert isinstance(found, str)
    assert said in found


def test_texts_of_one_token_predict_nothing() -> None:
    model = tiny("llama")
    found = judge_of(model, read_samples(model, [{"input_ids": ids(4, 1)}], None, 4), None, seed=0)
    assert found == "no sample has two tokens, so there is nothing to predict"
