"""The whole UltraFastBERT: a crammed BERT whose FFNs are trees, as transformers' RoBERTa with LayerNorm in front.

Of transformers' encoders, RoBERTa-PreLayerNorm alone has a LayerNorm on the embeddings, one before attention and FFN,
and one at the end. What the crammed BERT lacks (biases, token types) becomes zeros, its sinusoids become the table of
positions, and its prediction head, which is no more than the decoder, passes through the head that transformers has.

Legend: d width, V vocabulary, P positions, K trees, M nodes per tree.
Reading order: `ultrafastbert_model`, `_checked`, `_encoder`, `_head`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nogemm.activations import ActivationName
from nogemm.convert.checkpoint import attach
from nogemm.convert.importers._state import check_shape
from nogemm.convert.importers.ultrafastbert import ultrafastbert
from nogemm.convert.sites import sites
from nogemm.errors import CheckpointError
from nogemm.layers import TreeFFN

if TYPE_CHECKING:
    from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel

_NAME = "ultrafastbert_model"
_WORDS = "encoder.embedding.word_embedding.weight"
_OUTER = (
    _WORDS,
    "encoder.embedding.pos_embedding.scale_factor",
    "encoder.embedding.norm.weight",
    "encoder.embedding.norm.bias",
    "encoder.final_norm.weight",
    "encoder.final_norm.bias",
)
_INNER = (
    "norm1.weight",
    "norm1.bias",
    "attn.self_attention.query_key_value.weight",
    "attn.dense.weight",
    "norm2.weight",
    "norm2.bias",
    "ffn.linear_in.weight",
    "ffn.linear_in.bias",
    "ffn.linear_out.weight",
)
_TRANSFORM = ("prediction_head.dense.weight", "prediction_head.norm.weight", "prediction_head.norm.bias")
_OPTIONAL = ("decoder.weight", "decoder.bias", *_TRANSFORM)
_SCALING = "attn.self_attention.norm_factor"  # a buffer of the reference: 1 / sqrt(width of a head)
_MARGIN = 8.0  # GELU(x) = x to the last bit of float32 above this
_STEEPEST = 100.0


def ultrafastbert_model(
    state_dict: Mapping[str, Tensor],
    *,
    trees: int,
    heads: int = 12,
    activation: ActivationName = "gelu",
    positions: int = 128,
    eps: float = 1e-12,
    head: bool = True,
) -> RobertaPreLayerNormForMaskedLM | RobertaPreLayerNormModel:
    """Import a pretrained UltraFastBERT, encoder and head, with a TreeFFN in every layer.

    Hidden states and logits equal the reference's at every real token of texts that are padded on the right and come
    with their attention mask. Save, load, pack and distil it like any converted model.

    The reference's head is the decoder alone, transformers' is decoder(LayerNorm(GELU(dense h))). The dense matrix
    undoes the scale g and shift b of the final LayerNorm and moves the result n = (h - b) / g to the right by
    sqrt(d) + 8, where GELU changes nothing; the head's LayerNorm moves it back and scales again. In float32 this costs
    about 1e-5; in bfloat16 it would ruin the logits (not the hidden states), so keep `lm_head` in float32. A checkpoint
    with a transform of its own in the head is copied as it is.

    Args:
        state_dict: the whole model's tensors: `encoder.embedding`, `encoder.layers.{i}`, `encoder.final_norm`, and
            `decoder.weight` (tied, may be missing), `decoder.bias`, `prediction_head` (if it has a transform).
        trees: K; the depth follows from the shape.
        heads: of attention.
        activation: of the trees: "gelu", "relu" or "silu".
        positions: of the sinusoids, the longest text. Any number: the table is computed.
        eps: of all LayerNorms.
        head: False gives the encoder alone, for a checkpoint whose head cannot be expressed.
    Raises:
        CheckpointError: a key is missing, unknown or of the wrong shape; the decoder is not tied to the embedding; or
            the final LayerNorm has scales so near zero that it cannot be undone. The message names what is wrong.
    """
    state, layers = _checked(state_dict, heads, positions)
    ffns = [
        ultrafastbert(_below(state, f"encoder.layers.{i}.ffn."), trees=trees, activation=activation).eval()
        for i in range(layers)
    ]
    model = _build(_config(state, ffns, heads, positions, eps), head)
    nn.Module.to(model, state[_WORDS].dtype)
    for site, ffn in zip(sites(model), ffns, strict=True):
        site.install(ffn)
    weights = _encoder(state, layers, heads, positions)
    if head:
        weights = {f"{model.base_model_prefix}.{key}": value for key, value in weights.items()} | _head(state)
    result = model.load_state_dict(weights, strict=False)
    left = [key for key in result.missing_keys if ".intermediate.dense." not in key]  # the trees have theirs
    assert [*left, *result.unexpected_keys] == []
    attach(model)
    return model


def _checked(state_dict: Mapping[str, Tensor], heads: int, positions: int) -> tuple[dict[str, Tensor], int]:
    """Return the tensors, detached, and the number of layers; refuse wrong keys and shapes by name."""
    numbers = {int(found.group(1)) for key in state_dict if (found := re.match(r"encoder\.layers\.(\d+)\.", key))}
    layers = max(numbers, default=0) + 1
    wanted = [*_OUTER, *(f"encoder.layers.{i}.{key}" for i in range(layers) for key in _INNER)]
    if any(key in state_dict for key in _TRANSFORM):
        wanted += _TRANSFORM
    allowed = {*wanted, *_OPTIONAL, *(f"encoder.layers.{i}.{_SCALING}" for i in range(layers))}
    missing = [key for key in wanted if key not in state_dict]
    unknown = [key for key in state_dict if key not in allowed]
    if missing or unknown:
        parts = [f"{word}: {_some(keys)}" for word, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise CheckpointError(
            f"{_NAME}: {'; '.join(parts)}. Expected a pretrained UltraFastBERT with the keys encoder.embedding.*, "
            "encoder.layers.{i}.{norm1,attn,norm2,ffn}.*, encoder.final_norm.* and decoder.weight"
        )
    state = {key: value.detach() for key, value in state_dict.items()}
    vocabulary, d = check_shape(_NAME, state, _WORDS, (None, None))
    if heads < 1 or d % (2 * heads):
        raise CheckpointError(f"{_NAME}: heads={heads} of an even width do not divide the width {d} of {_WORDS}")
    if positions < 1:
        raise CheckpointError(f"{_NAME}: positions must be at least 1, got {positions}")
    check_shape(_NAME, state, _OUTER[1], (1,))
    shapes = {"query_key_value.weight": (3 * d, d), "dense.weight": (d, d), "linear_out.weight": (d, None)}
    shapes["linear_in.weight"] = (None, d)
    for key in (*_OUTER[2:], *wanted[len(_OUTER) :]):
        if not key.endswith("linear_in.bias"):  # depends on the trees: the layer's importer looks at it
            check_shape(_NAME, state, key, next((s for end, s in shapes.items() if key.endswith(end)), (d,)))
    if "decoder.weight" in state:
        check_shape(_NAME, state, "decoder.weight", (vocabulary, d))
        if not torch.equal(state["decoder.weight"], state[_WORDS]):
            raise CheckpointError(f"{_NAME}: decoder.weight differs from {_WORDS}; this importer expects them tied")
    if "decoder.bias" in state:
        check_shape(_NAME, state, "decoder.bias", (vocabulary,))
    for i in range(layers):
        factor = state.get(f"encoder.layers.{i}.{_SCALING}")
        if factor is not None and abs(float(factor) * math.sqrt(d // heads) - 1.0) > 1e-2:
            raise CheckpointError(
                f"{_NAME}: encoder.layers.{i}.{_SCALING} is {float(factor):g}, which is 1 / sqrt(width of a head) for "
                f"heads={round(d * float(factor) ** 2)}, but heads={heads} was given"
            )
    return state, layers


def _config(
    state: dict[str, Tensor], ffns: list[TreeFFN], heads: int, positions: int, eps: float
) -> RobertaPreLayerNormConfig:
    from transformers import RobertaPreLayerNormConfig

    vocabulary, d = state[_WORDS].shape
    return RobertaPreLayerNormConfig(
        vocab_size=vocabulary,
        hidden_size=d,
        num_hidden_layers=len(ffns),
        num_attention_heads=heads,
        intermediate_size=ffns[0].weight_in.shape[:2].numel(),
        hidden_act=ffns[0].activation,
        max_position_embeddings=positions + 1,  # RoBERTa numbers tokens from the padding's number on, which is 0 here
        type_vocab_size=1,
        layer_norm_eps=eps,
        pad_token_id=0,
    )


def _build(config: RobertaPreLayerNormConfig, head: bool) -> RobertaPreLayerNormForMaskedLM | RobertaPreLayerNormModel:
    """Build the model around placeholders of dense FFNs; its config names the width that a dense FFN would have."""
    from transformers import RobertaPreLayerNormForMaskedLM, RobertaPreLayerNormModel

    neurons, config.intermediate_size = config.intermediate_size, 1
    model = (
        RobertaPreLayerNormForMaskedLM(config) if head else RobertaPreLayerNormModel(config, add_pooling_layer=False)
    )
    config.intermediate_size = neurons
    return model.eval()


def _encoder(state: dict[str, Tensor], layers: int, heads: int, positions: int) -> dict[str, Tensor]:
    """Return all of the encoder but its FFNs under transformers' names."""
    words = state[_WORDS]
    d = words.shape[1]
    table = torch.zeros(positions + 1, d, dtype=words.dtype, device=words.device)
    table[1:] = state[_OUTER[1]] * _sinusoids(positions, d).to(words)
    zeros = words.new_zeros(d)
    out = {
        "embeddings.word_embeddings.weight": words,
        "embeddings.token_type_embeddings.weight": zeros.unsqueeze(0),
        "embeddings.position_embeddings.weight": table,
    }
    norms = {"embeddings.LayerNorm": "encoder.embedding.norm", "LayerNorm": "encoder.final_norm"}
    for i in range(layers):
        ours, theirs = f"encoder.layer.{i}", f"encoder.layers.{i}"
        norms[f"{ours}.attention.LayerNorm"] = f"{theirs}.norm1"
        norms[f"{ours}.intermediate.LayerNorm"] = f"{theirs}.norm2"
        # Row blocks of the fused matrix: query, key and value of the first head, then those of the second, ...
        fused = state[f"{theirs}.attn.self_attention.query_key_value.weight"].view(heads, 3, d // heads, d)
        for part, name in enumerate(("query", "key", "value")):
            out[f"{ours}.attention.self.{name}.weight"] = fused[:, part].reshape(d, d)
            out[f"{ours}.attention.self.{name}.bias"] = zeros
        out[f"{ours}.attention.output.dense.weight"] = state[f"{theirs}.attn.dense.weight"]
        out[f"{ours}.attention.output.dense.bias"] = zeros
    for mine, theirs in norms.items():
        for kind in ("weight", "bias"):
            out[f"{mine}.{kind}"] = state[f"{theirs}.{kind}"]
    return out


def _head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the masked-LM head under transformers' names; see `ultrafastbert_model` for how it passes the GELU."""
    words = state[_WORDS]
    vocabulary, d = words.shape
    bias = state.get("decoder.bias", words.new_zeros(vocabulary))
    out = {"lm_head.decoder.weight": words, "lm_head.decoder.bias": bias, "lm_head.bias": bias}
    if _TRANSFORM[0] in state:
        dense, weight, shift = (state[key] for key in _TRANSFORM)
        return out | {
            "lm_head.dense.weight": dense,
            "lm_head.dense.bias": words.new_zeros(d),
            "lm_head.layer_norm.weight": weight,
            "lm_head.layer_norm.bias": shift,
        }
    g, b = state["encoder.final_norm.weight"].double(), state["encoder.final_norm.bias"].double()
    if not bool(((g != 0) & (b.abs() <= _STEEPEST * g.abs())).all()):
        worst = int((g.abs() / b.abs().clamp_min(1e-30)).argmin())
        raise CheckpointError(
            f"{_NAME}: encoder.final_norm.weight[{worst}] is {float(g[worst]):g} beside a bias of {float(b[worst]):g}; "
            "transformers' head cannot undo that. Import the encoder alone with head=False; its logits are "
            "hidden @ word_embeddings.T"
        )
    # |n| is at most sqrt(d - 1) in every LayerNorm's answer, so n + sqrt(d) + 8 is where GELU is the identity.
    return out | {
        "lm_head.dense.weight": torch.diag(1.0 / g).to(words.dtype),
        "lm_head.dense.bias": (math.sqrt(d) + _MARGIN - b / g).to(words.dtype),
        "lm_head.layer_norm.weight": g.to(words.dtype),
        "lm_head.layer_norm.bias": b.to(words.dtype),
    }


def _sinusoids(positions: int, d: int) -> Tensor:
    """Return sin(p w_i) and cos(p w_i) side by side, w_i = 10000^(-2i/d), in float32 as the reference does, [P, d]."""
    rates = torch.exp(torch.arange(0, d, 2).float() * (-math.log(10000.0) / d))
    angles = torch.outer(torch.arange(positions).float(), rates)
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
    return ", ".join(keys[:6]) + more
