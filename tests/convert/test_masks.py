"""fill_mask: the tokens of the dense head at the masks, without its logits elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import decoders
import nogemm
from nogemm import ConfigError, HeadConfig
from nogemm.testing.compare import check_equal

MASK = 4
SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,
}
KINDS = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**SIZES)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(tf.ModernBertConfig(**SIZES, pad_token_id=0)),
}


def made(kind: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    ids = torch.randint(5, 99, (3, 8))
    ids[0, 2] = ids[0, 5] = ids[2, 7] = MASK
    return model, ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["exact", "deferred", "fast"])
def test_masks_get_the_dense_models_tokens(kind: str, mode: Any) -> None:
    model, ids = made(kind)
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    logits = model(ids, attention_mask=attention).logits
    expected = torch.where(ids == MASK, logits.argmax(-1), ids)
    nogemm.convert_head(model, HeadConfig(mode=mode))
    filled, choice = nogemm.fill_mask(model, ids, MASK, attention_mask=attention)
    check_equal("tokens", filled, expected)
    assert not torch.equal(filled, ids), "the comparison can fail"
    assert choice.token.shape == (3,)
    assert torch.allclose(choice.logit, logits[ids == MASK].amax(-1), atol=1e-4)
    after = model(ids, attention_mask=attention).logits
    assert after.shape == logits.shape, "the hook is gone"


def test_a_text_without_a_mask_stays() -> None:
    model, ids = made("bert")
    nogemm.convert_head(model)
    ids[ids == MASK] = 7
    filled, choice = nogemm.fill_mask(model, ids, MASK)
    check_equal("ids", filled, ids)
    assert len(choice.token) == 0


def test_weights_changed_behind_torchs_back_are_noticed() -> None:
    model, ids = made("bert")
    head = nogemm.convert_head(model)
    _, before = nogemm.fill_mask(model, ids, MASK)
    winner = (int(before.token[0]) + 1) % 99
    head.weight.data[winner] = 100 * head.weight.data[before.token[0]]
    filled, after = nogemm.fill_mask(model, ids, MASK)
    assert int(after.token[0]) == winner
    assert int(filled[0, 2]) == winner
    check_equal("tokens", after.token, model(ids).logits[ids == MASK].argmax(-1))


def test_ids_of_32_bits_are_filled() -> None:
    model, ids = made("bert")
    nogemm.convert_head(model)
    filled, _ = nogemm.fill_mask(model, ids.int(), MASK)
    check_equal("tokens", filled, nogemm.fill_mask(model, ids, MASK)[0].int())


IDS = torch.full((2, 8), 7)


@pytest.mark.parametrize(
    ("message", "ids", "token", "more"),
    [
        (r"input_ids must be int64 or int32 \[B, L\], got torch.int64 \(8,\)", IDS[0], MASK, {}),
        (r"input_ids must be int64 or int32 \[B, L\], got torch.float32 \(2, 8\)", IDS.float(), MASK, {}),
        (r"input_ids must be int64 or int32 \[B, L\], got list", [[7, 4]], MASK, {}),
        (r"input_ids holds no token, its shape is \(2, 0\)", IDS[:, :0], MASK, {}),
        (r"input_ids must be from 0 to 98, got 7 to 600", torch.tensor([[7, 600]]), MASK, {}),
        (r"input_ids must be from 0 to 98, got -5 to 7", torch.tensor([[7, -5]]), MASK, {}),
        (r"texts of 600 tokens are longer than the model's 512 positions", torch.full((1, 600), 7), MASK, {}),
        *((r"mask_token_id must be an integer from 0 to 98", IDS, bad, {}) for bad in (None, -1, 99, "[MASK]", True)),
        (r"attention_mask must be like input_ids", IDS, MASK, {"attention_mask": torch.ones(2, 5)}),
        (r"attention_mask must be like input_ids", IDS, MASK, {"attention_mask": torch.full((2, 8), torch.nan)}),
        (r"a sequence is padding alone", IDS, MASK, {"attention_mask": torch.zeros(2, 8)}),
        (r"labels are for training", IDS, MASK, {"labels": IDS}),
    ],
)
def test_arguments_out_of_range_are_named(message: str, ids: Any, token: Any, more: dict[str, Any]) -> None:
    model, _ = made("bert")
    nogemm.convert_head(model)
    with pytest.raises(ConfigError, match=f"fill_mask: {message}"):
        nogemm.fill_mask(model, ids, token, **more)


def test_what_cannot_be_filled_is_named() -> None:
    model, ids = made("bert")
    with pytest.raises(ConfigError, match="fill_mask: the model's head is dense"):
        nogemm.fill_mask(model, ids, MASK)
    head = nogemm.convert_head(model)
    with pytest.raises(ConfigError, match="training mode"):
        nogemm.fill_mask(model.train(), ids, MASK)
    assert not head._forward_pre_hooks
    decoder = decoders.make("llama")
    nogemm.convert_head(decoder)
    with pytest.raises(ConfigError, match=r"gets no state for each token .*\(states: \(3, 1, 24\)\)"):
        nogemm.fill_mask(decoder, ids, MASK, logits_to_keep=1)
    with torch.no_grad():
        model.eval().bert.embeddings.LayerNorm.bias[0] = float("nan")
    with pytest.raises(nogemm.NotFiniteError, match="position 0"):
        nogemm.fill_mask(model, ids, MASK)
