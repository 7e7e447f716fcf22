"""Decoders of every family: their FFNs convert, decode at batch 1, take prompts by the batch path, and are stored."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import nogemm
from nogemm.convert.sites import installed, record_sites
from nogemm.layers import HireFFN, PackedFFN
from nogemm.layers.hire.packed import PackedHire
from nogemm.ops import native_available
from nogemm.testing.compare import Mismatch
from nogemm.testing.compare_model import check_answers, check_same_model

V, D, F = 99, 24, 70
_COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_WIDE = {**_COMMON, "intermediate_size": F}
_GATED = {**_WIDE, "num_key_value_heads": 1, "head_dim": 12}


def _opt(**kwargs: Any) -> Any:
    return tf.OPTForCausalLM(tf.OPTConfig(**{**_COMMON, "init_std": 0.3}, ffn_dim=F, word_embed_proj_dim=D, **kwargs))


def _t5() -> Any:
    start: dict[str, Any] = {"decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=V, d_model=D, d_kv=12, d_ff=F, num_layers=1, num_decoder_layers=1, num_heads=2,
            eos_token_id=None, **start,
        )
    )  # fmt: skip


# Families whose neurons are zero unless they fire: converted without training, the function stays.
RELU: dict[str, Callable[[], Any]] = {
    "opt": _opt,
    "opt, norm behind": lambda: _opt(do_layer_norm_before=False),
    "nemotron": lambda: tf.NemotronForCausalLM(tf.NemotronConfig(**_WIDE, num_key_value_heads=2)),
    "arcee": lambda: tf.ArceeForCausalLM(tf.ArceeConfig(**_WIDE, num_key_value_heads=2)),
    "persimmon": lambda: tf.PersimmonForCausalLM(tf.PersimmonConfig(**_WIDE)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_WIDE, hidden_act="relu")),
    "t5": _t5,
    "llama with relu": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GATED, hidden_act="relu")),
}
# Families whose small activations count: what is left out has to be trained.
SMOOTH: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_GATED)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_GATED)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GATED)),
    "gemma": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**_GATED)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GATED)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GATED)),
    "gpt-neox with gelu": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_WIDE)),
}
ACTIVE = nogemm.HireConfig(keep=0.5, select="active")
every = pytest.mark.parametrize("kind", [*RELU, *SMOOTH])
relu = pytest.mark.parametrize("kind", list(RELU))


def make(kind: str) -> Any:
    torch.manual_seed(0)
    model = {**RELU, **SMOOTH}[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = None
    return model


def prompt(length: int = 9) -> Tensor:
    return torch.randint(3, V, (1, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    ids = prompt()
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


def decode(model: Any, count: int = 6) -> Tensor:
    return model.generate(prompt(), max_new_tokens=count, do_sample=False)


@every
def test_a_dense_copy_is_the_model(kind: str) -> None:
    model, dense = make(kind), make(kind)
    report = nogemm.convert(model, nogemm.DenseConfig())
    assert [site.fitted for site in report.sites] == ["exact", "exact"]
    assert not report.refused
    check_answers(kind, logits(model), dense, logits)
    assert torch.equal(decode(model), decode(dense))
    nogemm.pack(model, "fp32")
    check_answers(kind, logits(model), dense, logits)


@relu
@pytest.mark.parametrize("sketch", ["int8", "int4"])
def test_neurons_that_fire_are_the_whole_function(kind: str, sketch: Literal["int8", "int4"]) -> None:
    model, dense = make(kind), make(kind)
    config = nogemm.HireConfig(keep=0.5, select="active", sketch=sketch)
    report = nogemm.convert(model, config)
    assert [site.fitted for site in report.sites] == ["exact", "exact"]
    with record_sites(model) as seen:
        check_answers(kind, logits(model), dense, logits)
    for name, layer in nogemm.converted(model).items():
        assert isinstance(layer, HireFFN)
        found = layer.measure(seen[name][0])
        assert found.recall == 1.0
        assert found.kept < 0.9
    tokens = decode(dense)
    assert torch.equal(decode(model), tokens)
    nogemm.pack(model, "fp32")
    check_answers(kind, logits(model), dense, logits)  # the prompt, as one batch
    assert torch.equal(decode(model), tokens)  # one token at a time, with a cache
    if not model.config.is_encoder_decoder:
        nogemm.convert_head(model)
        assert torch.equal(nogemm.generate(model, prompt(), 6), tokens)


def test_a_neuron_left_out_is_noticed() -> None:
    model, dense = make("opt"), make("opt")
    nogemm.convert(model, ACTIVE)
    layer = next(iter(nogemm.converted(model).values()))
    assert isinstance(layer, HireFFN)
    with torch.no_grad(), record_sites(model) as seen:
        logits(model)
        fires = layer.choose(next(iter(seen.values()))[0].reshape(-1, D)).kept_NK
        layer.up_bias[fires[-1, 0]] = -100.0
    with pytest.raises(Mismatch, match="off by"):
        check_answers("opt", logits(model), dense, logits)


@pytest.mark.parametrize("kind", ["opt", "nemotron", "llama with relu", "t5"])
def test_stored_and_loaded(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    nogemm.convert(model, ACTIVE)
    nogemm.save(model, tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    check_same_model(kind, again, model, logits)
    assert torch.equal(decode(nogemm.pack(again, "fp32")), decode(model))


@pytest.mark.skipif(not native_available(), reason="the portable form keeps the layer as it is")
@pytest.mark.parametrize("kind", ["opt", "llama with relu"])
def test_rows_are_in_memory_once(kind: str) -> None:
    """What is packed holds each weight once, rows side by side, and the sketch; the dense weights are gone."""
    model = make(kind)
    nogemm.convert(model, ACTIVE)
    nogemm.pack(model, "bf16")
    gc.collect()
    gated = kind != "opt"
    weights = (2 + gated) * F * D
    for layer in installed(model).values():
        assert isinstance(layer, PackedHire)
        buffers = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in layer.buffers()}
        assert not list(layer.parameters())
        padded = 64 * (2 + gated) * F + 128 * D + 16384  # rows end at a cache line; the sketch is in groups of 64 rows
        assert 2 * weights + F * D <= sum(buffers.values()) <= 2 * weights + padded
        base = layer.get_buffer("packed").untyped_storage().data_ptr()
        for name in ("up", "down", *(["gate"] if gated else [])):
            assert layer.neurons.stored(name)[0].untyped_storage().data_ptr() == base, (
                "the batch path reads the same rows"
            )
    left = {tuple(p.shape) for p in model.parameters()}
    assert not left & {(F, D), (D, F)}


def test_prompts_and_tokens_take_their_own_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is multiplied as one batch where the machine's speeds say so; a token reads its rows."""
    model = make("opt")
    nogemm.convert(model, ACTIVE)
    nogemm.pack(model, "fp32")
    layers = [layer for layer in installed(model).values() if isinstance(layer, PackedHire) and layer.native]
    calls: list[tuple[str, int]] = []
    for layer in layers:
        layer.dense_from = 4
        whole = layer.neurons.masked
        monkeypatch.setattr(
            layer.neurons, "masked", lambda x, *rest, whole=whole: calls.append(("batch", len(x))) or whole(x, *rest)
        )
    tokens = decode(model)
    if layers:
        assert calls == [("batch", 9)] * len(layers)
    for layer in layers:
        layer.fix_path("rows")
    assert torch.equal(decode(model), tokens)
    assert calls == [("batch", 9)] * len(layers)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt-neox with gelu"])
@pytest.mark.parametrize(
    "config",
    [
        nogemm.HireConfig(keep=0.3),
        nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(rounds=2, block=8)),
        nogemm.TreeConfig(depth=2),
    ],
    ids=lambda config: config.kind,
)
def test_smooth_families_learn_and_pack(kind: str, config: Any) -> None:
    model, target = make(kind), logits(make(kind)).detach()
    nogemm.convert(model, config)
    optimiser = torch.optim.Adam([p for layer in nogemm.converted(model).values() for p in layer.parameters()], lr=1e-3)
    losses = []
    for _ in range(6):
        optimiser.zero_grad()
        loss = nn.functional.mse_loss(logits(model), target)
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with torch.no_grad():
        y = logits(model)
        nogemm.convert_head(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # random tables, on purpose
            nogemm.pack(model, "fp32")
        assert float((logits(model) - y).norm() / y.norm()) < 0.05
        assert torch.equal(nogemm.generate(model, prompt(), 5), decode(model, 5))


def gemma3n() -> Any:
    torch.manual_seed(0)
    config = tf.Gemma3nTextConfig(
        vocab_size=V, vocab_size_per_layer_input=V, hidden_size=D, hidden_size_per_layer_input=8, intermediate_size=F,
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=12, num_kv_shared_layers=0,
        layer_types=["full_attention"] * 3, activation_sparsity_pattern=[0.95, 0.8, 0.0], laurel_rank=4,
        altup_num_inputs=2, initializer_range=0.3, eos_token_id=None,
    )  # fmt: skip
    model = tf.Gemma3nForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return model


GEMMA3N = {
    "*.layers.[01].mlp": nogemm.HireConfig(keep=0.2, select="gaussian"),
    "*": nogemm.DenseConfig(),
}


@pytest.mark.parametrize("config", [nogemm.DenseConfig(), GEMMA3N], ids=["dense", "hire"])
def test_gemma3n_keeps_its_own_cutoff(config: Any, tmp_path: Path) -> None:
    model, dense = gemma3n(), gemma3n()
    report = nogemm.convert(model, config)
    assert [site.replaced.sparsity for site in report.sites] == [0.95, 0.8, 0.0]
    assert [site.fitted for site in report.sites] == ["exact"] * 3
    with record_sites(model) as seen:
        check_answers("gemma3n", logits(model), dense, logits)
    for name, layer in nogemm.converted(model).items():
        if isinstance(layer, HireFFN):
            found = layer.measure(seen[name][0])
            assert found.recall == 1.0
            assert 0 < found.kept < 0.35
    nogemm.save(model, tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    check_same_model("gemma3n", again, model, logits)
    nogemm.pack(again, "fp32")
    for path in ("rows", "dense"):
        for layer in installed(again).values():
            assert isinstance(layer, PackedFFN)
            layer.fix_path(path)
        check_answers(path, logits(again), dense, logits)
    assert torch.equal(decode(again), decode(dense))
    other = gemma3n()
    other.model.layers[0].mlp.activation_sparsity = 0.9
    with pytest.raises(Mismatch, match="off by"):
        check_answers("another cutoff", logits(again), other, logits)


def test_a_cutoff_is_taken_by_the_one_choice_that_is_for_it() -> None:
    for model, select in ((gemma3n(), "topk"), (make("llama"), "gaussian")):
        with pytest.raises(nogemm.ConfigError, match='select="gaussian" is for dense networks with a cutoff'):
            nogemm.convert(model, nogemm.HireConfig(select=select))  # type: ignore[arg-type]
    report = nogemm.convert(gemma3n(), nogemm.TreeConfig(depth=2))
    assert all(site.fitted != "exact" for site in report.sites)


def test_select_active_names_the_activation_that_it_cannot_take() -> None:
    with pytest.raises(nogemm.ConfigError, match="select=\"active\" needs a ReLU-type activation, got 'silu'"):
        nogemm.convert(make("llama"), ACTIVE)
