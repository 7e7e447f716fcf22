"""Small decoders of several kinds: heads tied and not, with a bias, with capped or scaled logits."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers as tf

V = 307  # no multiple of anything
_COMMON = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.6,
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": None,
}
_GEMMA = {**_COMMON, "head_dim": 12, "pad_token_id": 0, "sliding_window": 8}
DECODERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_COMMON, tie_word_embeddings=False)),
    "llama tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**_COMMON, tie_word_embeddings=True)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**_COMMON, tie_word_embeddings=True)),
    "gemma2 capped": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**_GEMMA, final_logit_softcapping=3.0)),
    "gemma3 sliding": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**_GEMMA)),
    "granite scaled": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**_COMMON, logits_scaling=4.0)),
    "phi with a bias": lambda: tf.PhiForCausalLM(tf.PhiConfig(**_COMMON)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=V, n_positions=64, initializer_range=0.6)
    ),
}


def make(kind: str) -> Any:
    """Make a decoder in evaluation mode; its biases are not zero, and it never ends a text by itself."""
    torch.manual_seed(0)
    model = DECODERS[kind]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.generation_config.eos_token_id = None
    return model


def prompts(count: int = 1, length: int = 5) -> torch.Tensor:
    """Return random prompts."""
    return torch.randint(2, V, (count, length))


def genai_tokens(folder: Path, ids_1L: torch.Tensor, count: int) -> list[int]:
    """Continue a prompt greedily with an exported decoder in openvino-genai, all of it in float32."""
    import openvino as ov
    import openvino_genai  # pyright: ignore[reportMissingImports]

    from nogemm.export.running import decoder_record

    pipe = openvino_genai.LLMPipeline(
        str(folder),
        openvino_genai.Tokenizer(str(folder)),
        "CPU",
        ATTENTION_BACKEND="SDPA",
        INFERENCE_PRECISION_HINT="f32",
        KV_CACHE_PRECISION="f32",  # its own choice is eight bits, another model after some tokens
        extensions=[str(folder / decoder_record(folder)["extension"])],
    )
    config = openvino_genai.GenerationConfig(max_new_tokens=count, ignore_eos=True, eos_token_id=1)
    inputs = openvino_genai.TokenizedInputs(ov.Tensor(ids_1L.numpy()), ov.Tensor(torch.ones_like(ids_1L).numpy()))
    return list(pipe.generate(inputs, config).tokens[0])
