"""Tiny random models whose FFN classes nobody listed: their sites are discovered and proven."""

from __future__ import annotations

from typing import Any

import transformers as tf
from tiny_models import BERT, VOCABULARY, Family

_ROW: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {**BERT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ: dict[str, Any] = {
    **_ROW,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
}
_V2: dict[str, Any] = {"conv_kernel_size": 3, "conv_act": "gelu"}
_V3: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
}
_IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _names(pattern: str, count: int = 2) -> tuple[str, ...]:
    return tuple(pattern.format(i) for i in range(count))


_ENDS = ("encoder.layers.0", "decoder.layers.0")

UNLISTED: dict[str, Family] = {
    "mpnet": Family(lambda: tf.MPNetModel(tf.MPNetConfig(**BERT)), tf.AutoModel, _names("encoder.layer.{}")),
    "albert": Family(
        lambda: tf.AlbertModel(tf.AlbertConfig(**BERT, embedding_size=8)),
        tf.AutoModel,
        ("encoder.albert_layer_groups.0.albert_layers.0",),
    ),
    "deberta": Family(
        lambda: tf.DebertaModel(tf.DebertaConfig(**BERT, relative_attention=True, pos_att_type=["c2p", "p2c"])),
        tf.AutoModel,
        _names("encoder.layer.{}"),
    ),
    "deberta-v2": Family(
        lambda: tf.DebertaV2Model(tf.DebertaV2Config(**BERT, **_V2)),
        tf.AutoModel,
        _names("encoder.layer.{}"),
    ),
    "deberta-v3": Family(
        lambda: tf.DebertaV2Model(tf.DebertaV2Config(**BERT, **_V3)),
        tf.AutoModel,
        _names("encoder.layer.{}"),
    ),
    "esm": Family(
        lambda: tf.EsmModel(tf.EsmConfig(**BERT, pad_token_id=1, mask_token_id=2)),
        tf.AutoModel,
        _names("encoder.layer.{}"),
    ),
    "gpt-neox": Family(
        lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_GPT)),
        tf.AutoModelForCausalLM,
        _names("gpt_neox.layers.{}.mlp"),
    ),
    "starcoder2": Family(
        lambda: tf.Starcoder2ForCausalLM(
            tf.Starcoder2Config(**_GPT, num_key_value_heads=2, hidden_act="gelu_pytorch_tanh", residual_dropout=0.3)
        ),
        tf.AutoModelForCausalLM,
        _names("model.layers.{}.mlp"),
    ),
    "falcon": Family(
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(**_GPT, ffn_hidden_size=32, new_decoder_architecture=True, num_kv_heads=2)
        ),
        tf.AutoModelForCausalLM,
        _names("transformer.h.{}.mlp"),
    ),
    "bloom": Family(
        lambda: tf.BloomForCausalLM(tf.BloomConfig(**_ROW, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.2)),
        tf.AutoModelForCausalLM,
        _names("transformer.h.{}.mlp"),
    ),
    "phi": Family(
        lambda: tf.PhiForCausalLM(tf.PhiConfig(**_GPT)), tf.AutoModelForCausalLM, _names("model.layers.{}.mlp")
    ),
    "whisper": Family(
        lambda: tf.WhisperModel(
            tf.WhisperConfig(
                **{**_SEQ2SEQ, "max_position_embeddings": 40},
                num_mel_bins=8,
                max_source_positions=10,
                max_target_positions=40,
                activation_dropout=0.3,
            )
        ),
        tf.AutoModel,
        _ENDS,
        encoder_decoder=True,
        sound=(8, 20),
        inner_dropout=True,
    ),
    "clip-text": Family(
        lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**_GPT)), tf.CLIPTextModel, _names("encoder.layers.{}.mlp")
    ),
    "clip-vision": Family(
        lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_IMAGE)),
        tf.CLIPVisionModel,
        _names("encoder.layers.{}.mlp"),
        image=True,
    ),
    "siglip-text": Family(
        lambda: tf.SiglipTextModel(tf.SiglipTextConfig(**_GPT)), tf.SiglipTextModel, _names("encoder.layers.{}.mlp")
    ),
    "siglip-vision": Family(
        lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**_IMAGE)),
        tf.SiglipVisionModel,
        (*_names("encoder.layers.{}.mlp"), "head.mlp"),
        image=True,
    ),
    "dinov2": Family(
        lambda: tf.Dinov2Model(tf.Dinov2Config(**_IMAGE, mlp_ratio=2)),
        tf.AutoModel,
        _names("encoder.layer.{}.mlp"),
        image=True,
    ),
    "dinov2-swiglu": Family(
        lambda: tf.Dinov2Model(tf.Dinov2Config(**_IMAGE, mlp_ratio=3, use_swiglu_ffn=True)),
        tf.AutoModel,
        _names("encoder.layer.{}.mlp"),
        gated=True,
        image=True,
    ),
    "wav2vec2": Family(
        lambda: tf.Wav2Vec2Model(
            tf.Wav2Vec2Config(
                **BERT,
                conv_dim=[8, 8],
                conv_stride=[5, 4],
                conv_kernel=[10, 8],
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
                activation_dropout=0.3,
                layerdrop=0.0,
                mask_time_prob=0.0,
            )
        ),
        tf.AutoModel,
        _names("encoder.layers.{}.feed_forward"),
        sound=(400,),
        inner_dropout=True,
    ),
    "bart": Family(
        lambda: tf.BartModel(tf.BartConfig(**_SEQ2SEQ, activation_dropout=0.3)),
        tf.AutoModel,
        _ENDS,
        encoder_decoder=True,
        inner_dropout=True,
    ),
    "pegasus": Family(lambda: tf.PegasusModel(tf.PegasusConfig(**_SEQ2SEQ)), tf.AutoModel, _ENDS, encoder_decoder=True),
}

REMOTE_CONFIG = """
from transformers import PretrainedConfig

class OddConfig(PretrainedConfig):
    model_type = "odd"
    def __init__(self, width=16, inner=24, depth=2, vocab_size=64, **kwargs):
        self.width, self.inner, self.depth, self.vocab_size = width, inner, depth, vocab_size
        super().__init__(**kwargs)
"""
REMOTE_MODEL = """
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from .configuration_odd import OddConfig

class FFN(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_gate = nn.Linear(config.width, 2 * config.inner, bias=False)
        self.back = nn.Linear(config.inner, config.width)
    def forward(self, x):
        up, gate = self.up_gate(x).chunk(2, dim=-1)
        return self.back(F.gelu(gate) * up)

class OddLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(config.width), nn.Linear(config.width, config.width), FFN(config)
    def forward(self, x, bias):
        return x + self.mlp(self.norm(x + self.mix(x.mean(1, keepdim=True)) + bias))

class OddModel(PreTrainedModel):
    config_class = OddConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(OddLayer(config) for _ in range(config.depth))
        self.post_init()
    def forward(self, input_ids, attention_mask=None, return_dict=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, 0.5)
        return BaseModelOutput(last_hidden_state=x)
"""
