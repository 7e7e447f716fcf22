"""Tiny random models of every family, built from configs, and the inputs they take."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as tf
from torch import Tensor

import nogemm

VOCABULARY = 64
SMALL = nogemm.LookupConfig(tables=4, bits=3, projection=nogemm.BHConfig(rounds=2, block=8))
BERT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 40,
}
_LLAMA: dict[str, Any] = {**BERT, "num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """How to build one tiny model, which Auto class loads it, and what its sites are called."""

    make: Callable[[], Any]
    auto: Any
    names: tuple[str, ...]
    gated: bool = False
    encoder_decoder: bool = False
    image: bool = False
    sound: tuple[int, ...] = ()  # shape of one sound: samples, or bands and frames
    # The dropout between the matrices goes with them, so training can only be compared without it.
    inner_dropout: bool = False

    def build(self, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return self.make().eval()

    def inputs(self, batch: int = 2, length: int = 7) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if self.image:
            return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
        ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
        if self.sound:
            sound = torch.randn(batch, *self.sound, generator=generator)
            spoken: dict[str, Tensor] = {"input_features": sound, "decoder_input_ids": ids}
            return spoken if self.encoder_decoder else {"input_values": sound}
        batch_inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {**batch_inputs, "decoder_input_ids": ids} if self.encoder_decoder else batch_inputs

    def output(self, model: Any) -> Tensor:
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in self.inputs().items()}
        with torch.no_grad():
            return model(**inputs)[0]


def _names(pattern: str) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(2))


def _t5(**kwargs: Any) -> Any:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_decoder_layers=1,
            num_heads=2,
            vocab_size=VOCABULARY,
            **kwargs,
        )
    )


_T5_NAMES = ("encoder.block.0.layer.1.DenseReluDense", "decoder.block.0.layer.2.DenseReluDense")

FAMILIES: dict[str, Family] = {
    "bert": Family(
        lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)), tf.AutoModelForMaskedLM, _names("bert.encoder.layer.{}")
    ),
    "roberta": Family(
        lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**BERT)),
        tf.AutoModelForMaskedLM,
        _names("roberta.encoder.layer.{}"),
    ),
    "roberta-prelayernorm": Family(
        lambda: tf.RobertaPreLayerNormForMaskedLM(tf.RobertaPreLayerNormConfig(**BERT)),
        tf.AutoModelForMaskedLM,
        _names("roberta_prelayernorm.encoder.layer.{}"),
    ),
    "electra": Family(
        lambda: tf.ElectraForPreTraining(tf.ElectraConfig(**BERT, embedding_size=8)),
        tf.AutoModelForPreTraining,
        _names("electra.encoder.layer.{}"),
    ),
    "distilbert": Family(
        lambda: tf.DistilBertForMaskedLM(
            tf.DistilBertConfig(dim=16, hidden_dim=32, n_layers=2, n_heads=2, vocab_size=VOCABULARY)
        ),
        tf.AutoModelForMaskedLM,
        _names("distilbert.transformer.layer.{}.ffn"),
    ),
    "modernbert": Family(
        lambda: tf.ModernBertForMaskedLM(
            tf.ModernBertConfig(**BERT, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2)
        ),
        tf.AutoModelForMaskedLM,
        _names("model.layers.{}.mlp"),
        gated=True,
    ),
    "vit": Family(
        lambda: tf.ViTForImageClassification(
            tf.ViTConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            )
        ),
        tf.AutoModelForImageClassification,
        _names("vit.layers.{}.mlp"),
        image=True,
    ),
    "gpt2": Family(
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=16, n_inner=32, n_layer=2, n_head=2, vocab_size=VOCABULARY, n_positions=40)
        ),
        tf.AutoModelForCausalLM,
        _names("transformer.h.{}.mlp"),
    ),
    "opt": Family(
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**BERT, ffn_dim=32, word_embed_proj_dim=16)),
        tf.AutoModelForCausalLM,
        _names("model.decoder.layers.{}"),
    ),
    "opt-post-norm": Family(
        lambda: tf.OPTForCausalLM(tf.OPTConfig(**BERT, ffn_dim=32, word_embed_proj_dim=16, do_layer_norm_before=False)),
        tf.AutoModelForCausalLM,
        _names("model.decoder.layers.{}"),
    ),
    "llama": Family(
        lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_LLAMA)),
        tf.AutoModelForCausalLM,
        _names("model.layers.{}.mlp"),
        gated=True,
    ),
    "qwen3": Family(
        lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_LLAMA)),
        tf.AutoModelForCausalLM,
        _names("model.layers.{}.mlp"),
        gated=True,
    ),
    "phi3": Family(
        lambda: tf.Phi3ForCausalLM(
            tf.Phi3Config(**BERT, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
        ),
        tf.AutoModelForCausalLM,
        _names("model.layers.{}.mlp"),
        gated=True,
    ),
    "t5": Family(_t5, tf.AutoModelForSeq2SeqLM, _T5_NAMES, encoder_decoder=True, inner_dropout=True),
    "t5-gated": Family(
        lambda: _t5(feed_forward_proj="gated-gelu"),
        tf.AutoModelForSeq2SeqLM,
        _T5_NAMES,
        gated=True,
        encoder_decoder=True,
        inner_dropout=True,
    ),
}


def train_a_little(model: Any) -> None:
    """Change every converted layer as an optimiser would."""
    with torch.no_grad():
        for layer in nogemm.converted(model).values():
            for parameter in layer.parameters():
                parameter.add_(0.01 * torch.randn(parameter.shape))


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh process that finds nogemm where this one did, and wait for it."""
    source = str(Path(nogemm.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
