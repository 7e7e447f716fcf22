"""The crammed BERT with trees, written out below in float64, against the imported transformers model."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM

import nogemm
from nogemm.layers import TreeFFN
from nogemm.testing.compare_model import check_same_model

State = dict[str, Tensor]
D, HEADS, LAYERS, WORDS, TREES, DEPTH, LONGEST = 24, 3, 2, 40, 2, 3, 20
NODES = 2 ** (DEPTH + 1) - 1


def published_layout(*, transform: bool = False) -> State:
    """Draw a checkpoint with the keys and shapes of the published one, narrow."""

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64)

    def norm(name: str) -> State:
        return {f"{name}.weight": 1 + draw(D, scale=0.3), f"{name}.bias": draw(D, scale=0.2)}

    state = {
        "encoder.embedding.word_embedding.weight": draw(WORDS, D),
        "encoder.embedding.pos_embedding.scale_factor": draw(1),
        **norm("encoder.embedding.norm"),
        **norm("encoder.final_norm"),
    }
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}"
        state |= {
            **norm(f"{layer}.norm1"),
            **norm(f"{layer}.norm2"),
            f"{layer}.attn.self_attention.norm_factor": torch.tensor(D // HEADS).rsqrt(),
            f"{layer}.attn.self_attention.query_key_value.weight": draw(3 * D, D, scale=0.3),
            f"{layer}.attn.dense.weight": draw(D, D, scale=0.3),
            f"{layer}.ffn.linear_in.weight": draw(TREES * NODES, D, scale=0.3),
            f"{layer}.ffn.linear_in.bias": draw(TREES * NODES, scale=0.3),
            f"{layer}.ffn.linear_out.weight": draw(D, TREES * NODES, scale=0.3),
        }
    if transform:
        state |= {"prediction_head.dense.weight": draw(D, D, scale=0.3), **norm("prediction_head.norm")}
    state["decoder.weight"] = state["encoder.embedding.word_embedding.weight"].clone()
    return state


class CrammedBert:
    """One text at a time, one head, one token and one tree after the other: slow and plain."""

    def __init__(self, state: State) -> None:
        self.state = state

    def hidden(self, ids: list[int]) -> Tensor:
        words = self.state["encoder.embedding.word_embedding.weight"][ids]
        positions = torch.tensor([[self.wave(p, i) for i in range(D)] for p in range(len(ids))], dtype=torch.float64)
        h = self.norm(
            "encoder.embedding.norm", words + self.state["encoder.embedding.pos_embedding.scale_factor"] * positions
        )
        for i in range(LAYERS):
            layer = f"encoder.layers.{i}"
            h = h + self.attention(f"{layer}.attn", self.norm(f"{layer}.norm1", h))
            h = h + torch.stack([self.trees(f"{layer}.ffn", x) for x in self.norm(f"{layer}.norm2", h)])
        return self.norm("encoder.final_norm", h)

    def logits(self, ids: list[int]) -> Tensor:
        h = self.hidden(ids)
        if "prediction_head.dense.weight" in self.state:
            h = h @ self.state["prediction_head.dense.weight"].T
            h = self.norm("prediction_head.norm", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
        return h @ self.state["decoder.weight"].T

    def wave(self, position: int, i: int) -> float:
        angle = position / 10000 ** (2 * (i // 2) / D)
        return math.cos(angle) if i % 2 else math.sin(angle)

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        unit = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-12)
        return unit * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def attention(self, name: str, x: Tensor) -> Tensor:
        width = D // HEADS
        mixed = x @ self.state[f"{name}.self_attention.query_key_value.weight"].T
        answers = []
        for head in range(HEADS):  # each head owns 3 blocks of columns: its queries, keys and values
            query, key, value = mixed[:, 3 * width * head : 3 * width * (head + 1)].split(width, dim=1)
            scores = query @ key.T / math.sqrt(width)
            answers.append(scores.softmax(1) @ value)
        return torch.cat(answers, 1) @ self.state[f"{name}.dense.weight"].T

    def trees(self, name: str, x: Tensor) -> Tensor:
        z = (self.state[f"{name}.linear_in.weight"] @ x + self.state[f"{name}.linear_in.bias"]).tolist()
        y = torch.zeros(D, dtype=torch.float64)
        for tree in range(TREES):
            node = 0
            while node < NODES:
                value = z[tree * NODES + node]
                fired = 0.5 * value * (1 + math.erf(value / math.sqrt(2)))
                y += fired * self.state[f"{name}.linear_out.weight"][:, tree * NODES + node]
                node = 2 * node + (2 if value > 0 else 1)
        return y


TEXTS = [[5, 9, 2, 31, 7, 7, 12], [3, 39, 1, 20]]


def padded() -> dict[str, Tensor]:
    longest = max(map(len, TEXTS))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in TEXTS])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def imported(state: State, **kwargs: Any) -> Any:
    return nogemm.importers.ultrafastbert_model(state, trees=TREES, heads=HEADS, positions=LONGEST, **kwargs)


def check_logits(model: Any, state: State, tolerance: float) -> None:
    with torch.no_grad():
        logits = model(**padded()).logits
    for text, got in zip(TEXTS, logits, strict=True):
        torch.testing.assert_close(
            got[: len(text)].double(), CrammedBert(state).logits(text), rtol=tolerance, atol=tolerance
        )


def check_hidden(encoder: Any, state: State, tolerance: float) -> None:
    with torch.no_grad():
        hidden = encoder(**padded()).last_hidden_state
    for text, got in zip(TEXTS, hidden, strict=True):
        torch.testing.assert_close(
            got[: len(text)].double(), CrammedBert(state).hidden(text), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("transform", [False, True])
def test_the_whole_model_answers_as_the_reference(transform: bool) -> None:
    state = published_layout(transform=transform)
    model = imported(state)
    # The table of sinusoids is float32, as in the reference; everything else is float64.
    check_hidden(model.roberta_prelayernorm, state, 1e-5)
    check_logits(model, state, 1e-5)
    layers = list(nogemm.converted(model).values())
    assert [type(layer) for layer in layers] == [TreeFFN] * LAYERS
    assert all(layer.fitted == "exact" and not layer.training for layer in layers)
    assert model.config.intermediate_size == TREES * NODES
    assert model.lm_head.decoder.weight is model.roberta_prelayernorm.embeddings.word_embeddings.weight


def test_float32_costs_little_and_wrong_weights_would_be_seen() -> None:
    state = published_layout()
    model = imported({key: value.float() for key, value in state.items()})
    assert model.dtype == torch.float32
    check_logits(model, state, 2e-3)  # logits are about sqrt(d) large, and a path may not flip on these seeds
    for key in ("encoder.layers.1.norm2.bias", "encoder.layers.0.attn.dense.weight", "encoder.final_norm.weight"):
        wrong = {**state, key: 1.5 * state[key]}
        with pytest.raises(AssertionError, match="not close"):
            check_logits(imported(wrong), state, 2e-3)


def test_heads_are_not_interchangeable() -> None:
    """Negative control of the fused matrix: blocks in the order of all queries, all keys, all values would be seen."""
    state = published_layout()
    wrong = dict(state)
    for i in range(LAYERS):
        key = f"encoder.layers.{i}.attn.self_attention.query_key_value.weight"
        wrong[key] = state[key].view(HEADS, 3, D // HEADS, D).transpose(0, 1).reshape(3 * D, D)
    with pytest.raises(AssertionError, match="not close"):
        check_hidden(imported(wrong, head=False), state, 1e-3)


def test_the_encoder_alone() -> None:
    state = published_layout()
    state["encoder.final_norm.weight"][3] = 0.0  # the head could not undo it
    encoder = imported(state, head=False)
    check_hidden(encoder, state, 1e-5)
    with pytest.raises(nogemm.CheckpointError, match=r"final_norm\.weight\[3\] is 0 .*head=False"):
        imported(state)


def test_it_saves_reloads_packs_and_trains(tmp_path: Path) -> None:
    state = published_layout()
    model = imported({key: value.float() for key, value in state.items()})
    nogemm.save(model, tmp_path / "model")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        expected = model.eval()(**padded()).logits
    check_same_model("loaded", again, model, lambda one: one(**padded()).logits)
    check_hidden(AutoModel.from_pretrained(tmp_path / "model").eval(), state, 1e-3)
    optimiser = torch.optim.SGD(again.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        loss = again(**padded(), labels=padded()["input_ids"]).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    nogemm.pack(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**padded()).logits, expected, rtol=1e-3, atol=1e-3)


def test_longer_texts_need_only_a_longer_table() -> None:
    state = published_layout()
    text = [1 + i % (WORDS - 1) for i in range(LONGEST + 5)]
    model = nogemm.importers.ultrafastbert_model(state, trees=TREES, heads=HEADS, positions=LONGEST + 5)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([text])).logits[0]
    torch.testing.assert_close(logits, CrammedBert(state).logits(text), rtol=1e-5, atol=1e-5)


def test_a_decoder_bias_is_kept() -> None:
    state = published_layout()
    bias = torch.randn(WORDS, dtype=torch.float64)
    with torch.no_grad():
        plain, shifted = (imported(part)(**padded()).logits for part in (state, {**state, "decoder.bias": bias}))
    torch.testing.assert_close(shifted - plain, bias.expand_as(plain))


def test_every_wrong_key_and_shape_is_named() -> None:
    good = published_layout()
    layer = "encoder.layers.1"

    def without(*keys: str) -> State:
        return {key: value for key, value in good.items() if key not in keys}

    narrow = good[f"{layer}.attn.dense.weight"][:, :-1]
    cases: list[tuple[State, dict[str, Any], str]] = [
        (without(f"{layer}.norm2.bias"), {}, f"missing: {layer}.norm2.bias"),
        (without("encoder.embedding.pos_embedding.scale_factor"), {}, "missing: encoder.embedding.pos_embedding.scale"),
        ({**good, "pooler.dense.weight": torch.zeros(3)}, {}, "unknown: pooler.dense.weight"),
        ({**good, f"{layer}.attn.dense.weight": narrow}, {}, f"{layer}.attn.dense.weight has shape [24, 23]"),
        ({**good, f"{layer}.ffn.linear_in.bias": torch.zeros(3)}, {}, "linear_in.bias has shape [3], expected [30]"),
        ({**good, "decoder.weight": good["decoder.weight"] + 1}, {}, "decoder.weight differs from"),
        (good, {"trees": 4}, "has 30 neurons, which are not trees=4 trees"),
        (good, {"heads": 5}, "heads=5 of an even width do not divide the width 24"),
        (good, {"heads": 2}, "for heads=3, but heads=2 was given"),
        (good, {"positions": 0}, "positions must be at least 1, got 0"),
        ({"linear_in.weight": torch.zeros(3, 2)}, {}, "unknown: linear_in.weight. Expected a pretrained UltraFastBERT"),
        (
            {**without(f"{layer}.ffn.linear_out.weight"), f"{layer}.ffn.dense_out.weight": torch.zeros(2, 2)},
            {},
            f"missing: {layer}.ffn.linear_out.weight; unknown: {layer}.ffn.dense_out.weight",
        ),
        (
            published_layout(transform=True) | {"prediction_head.norm.bias": torch.zeros(2)},
            {},
            "prediction_head.norm.bias has shape [2]",
        ),
    ]
    for state, change, words in cases:
        with pytest.raises(nogemm.CheckpointError, match=re.escape(words)):
            nogemm.importers.ultrafastbert_model(
                state, **{"trees": TREES, "heads": HEADS, "positions": LONGEST, **change}
            )
