"""A GGUF file of a Llama of one layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a Llama of one layer as llama.cpp would, its matrices in Q8_0; return what they stand for."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(96)
    square = ("attn_q", "attn_k", "attn_v", "attn_output")
    shapes = {"token_embd": (96, 32), "output": (96, 32)} | {f"blk.0.{name}": (32, 32) for name in square}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    random, means = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(random.standard_normal(shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        means[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return means
