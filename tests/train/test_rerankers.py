"""Heads whose logits are no classes (one logit, regression, labels behind a sigmoid), and texts that come in pairs."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import LOOKUP, WordTokenizer, make_texts
from torch import nn
from torch.nn import functional as F

import nogemm
from nogemm.train import Batches, DistilOptions, TokenFile, TrainingError, distil
from nogemm.train.losses import Spread, label_loss, number_loss, output_kind
from nogemm.train.masking import Masking
from nogemm.train.stages import run

SIGMOID = {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
IDENTITY = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
OLD_SIGMOID = {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}


class PairTokenizer(WordTokenizer):
    """Tokens of the second text are of type 1."""

    def __call__(self, first: list[str], second: list[str] | None = None, **how: Any) -> dict[str, Any]:
        left = super().__call__(first, **how)["input_ids"]
        right = [[]] * len(left) if second is None else super().__call__(second, **how)["input_ids"]
        ids = [a + b for a, b in zip(left, right, strict=True)]
        types = [[0] * len(a) + [1] * len(b) for a, b in zip(left, right, strict=True)]
        return {"input_ids": ids, "token_type_ids": types}


def make_reranker(**config: Any) -> tuple[nn.Module, nn.Module]:
    """Make a teacher with a head on the whole text, one logit by default, and its converted copy."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 62, "initializer_range": 0.3, "num_labels": 1, **config}
    teacher = BertForSequenceClassification(BertConfig(**sizes)).eval()
    model = copy.deepcopy(teacher)
    nogemm.convert(model, LOOKUP)
    return teacher, model


def train(teacher: nn.Module, model: nn.Module, data: Any = None, tokenizer: Any = None, **changes: Any) -> Any:
    chosen = {"batch_tokens": 256, "max_length": 16, "stage1_share": 0.0, "tokens": 8_000, "bar": False, **changes}
    return distil(model, teacher, data or make_texts(), tokenizer=tokenizer or WordTokenizer(), **chosen)


@pytest.mark.parametrize("config", [{}, SIGMOID, {"problem_type": "regression", "num_labels": 2}], ids=str)
def test_heads_without_classes_learn_their_teachers_output(config: dict[str, Any]) -> None:
    teacher, model = make_reranker(**config)
    report = train(teacher, model, hidden_weight=0.0)
    stage = report.stages[-1]
    assert stage.first["output"] > 0
    assert stage.last["output"] < 0.5 * stage.first["output"]


CASES = [
    ({}, 1, "numbers"),
    ({}, 3, "classes"),
    (IDENTITY, 1, "numbers"),
    (SIGMOID, 1, "labels"),
    (OLD_SIGMOID, 1, "labels"),
    (IDENTITY | {"problem_type": "multi_label_classification"}, 1, "numbers"),
    ({"problem_type": "multi_label_classification"}, 1, "labels"),
    ({"problem_type": "multi_label_classification"}, 3, "labels"),
    ({"problem_type": "regression"}, 3, "numbers"),
    ({"problem_type": "single_label_classification"}, 3, "classes"),
]


@pytest.mark.parametrize(("config", "width", "kind"), CASES, ids=str)
def test_what_logits_are_follows_from_the_config(config: dict[str, Any], width: int, kind: str) -> None:
    output = SimpleNamespace(logits=torch.zeros(4, width))
    assert output_kind(output, "auto", SimpleNamespace(**config)) == kind
    assert output_kind(output, "embedding", SimpleNamespace(**config)) == "embedding"
    tokens = SimpleNamespace(logits=torch.zeros(4, 5, 3))
    assert output_kind(tokens, "logits", SimpleNamespace(**config)) == "classes"


def test_losses_by_hand() -> None:
    target = torch.tensor([[1.0], [3.0]])  # mean 2, variance 1
    assert number_loss(torch.tensor([[2.0], [3.0]]), target, Spread(1)).item() == pytest.approx(0.5)
    alone = number_loss(torch.tensor([[3.0]]), torch.tensor([[2.0]]), Spread(1))
    assert alone.item() == pytest.approx(1 / (0.01 * 4))  # one value has no variance: a hundredth of its square
    ours, theirs = torch.randn(5, 3), torch.randn(5, 3)
    goal = theirs.sigmoid()
    entropy = -(goal * goal.log() + (1 - goal) * (1 - goal).log()).sum(-1).mean()
    cross = F.binary_cross_entropy_with_logits(ours, goal, reduction="none").sum(-1).mean()
    assert label_loss(ours, theirs).item() == pytest.approx((cross - entropy).item(), rel=1e-4)
    assert label_loss(theirs, theirs).item() == 0.0


def test_a_loss_that_cannot_tell_outputs_apart_stops_the_run() -> None:
    teacher, model = make_reranker(num_labels=2)
    with torch.no_grad():  # a softmax gives (1, 0) whatever the text
        teacher.get_parameter("classifier.bias").copy_(torch.tensor([500.0, -500.0]))
        model.get_parameter("classifier.bias").copy_(torch.tensor([900.0, -900.0]))
    before = copy.deepcopy(model)
    with pytest.raises(TrainingError, match=r"0 in each of the first 10 updates although the outputs differ"):
        train(teacher, model)
    with pytest.raises(TrainingError, match=r"in each of the first \d updates"):  # a whole stage shorter than that
        train(teacher, before, tokens=600)


def test_a_model_that_already_answers_like_its_teacher_is_no_error() -> None:
    teacher, _ = make_reranker()
    assert train(teacher, copy.deepcopy(teacher), tokens=600).stages[-1].last["output"] == pytest.approx(0.0, abs=1e-6)


def test_a_second_stage_without_any_loss_is_refused() -> None:
    with pytest.raises(nogemm.ConfigError, match="nothing to learn"):
        DistilOptions(hidden_weight=0.0, output="none")
    DistilOptions(hidden_weight=0.0, output="none", stage1_share=1.0)


def pairs(count: int = 60) -> list[dict[str, str]]:
    left, right = make_texts(count, seed=3), make_texts(count, seed=4)
    return [{"query": a, "document": b} for a, b in zip(left, right, strict=True)]


def test_pairs_are_read_as_the_tokenizer_joins_them(tmp_path: Path) -> None:
    teacher, model = make_reranker()
    rows = pairs()
    train(teacher, model, rows, PairTokenizer(), pair=("query", "document"), output_dir=tmp_path, tokens=2_000)
    file = TokenFile(tmp_path / "tokens")
    how: dict[str, Any] = {"truncation": True, "max_length": 16, "padding": False}
    expected = PairTokenizer()([r["query"] for r in rows], [r["document"] for r in rows], **how)
    assert [file.text(i).tolist() for i in range(len(file))] == expected["input_ids"]
    assert [file.text_types(i).tolist() for i in range(len(file))] == expected["token_type_ids"]
    with pytest.raises(nogemm.train.DataError, match=r"pair: \['query', 'document'\], now None"):
        train(teacher, model, rows, PairTokenizer(), field="query", output_dir=tmp_path, tokens=2_000, resume=True)

    batch = Batches(file, batch_tokens=64, seed=0, pad_id=0).padded(np.arange(2))
    assert batch.types is not None
    assert batch.types.tolist() == [
        row + [0] * (batch.ids.shape[1] - len(row)) for row in expected["token_type_ids"][:2]
    ]
    hidden, _ = Masking(mask_id=5, special=frozenset()).apply(batch)
    assert hidden.types is batch.types
    for i in range(2):
        inputs = {name: torch.tensor([expected[name][i]]) for name in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            alone, other = teacher(**inputs).logits, teacher(inputs["input_ids"]).logits
            together = run(teacher, batch).logits[i : i + 1]
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert (together - other).abs().max() > 1e-3


def test_models_without_token_types_do_not_get_them(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    model = DistilBertModel(DistilBertConfig(vocab_size=62, dim=16, n_layers=1, n_heads=2, hidden_dim=32)).eval()
    twin = copy.deepcopy(model)
    assert train(model, twin, pairs(), PairTokenizer(), pair=("query", "document"), tokens=300).tokens >= 300


@pytest.mark.parametrize("changes", [{"pair": ("a",)}, {"pair": "ab"}, {"pair": ("a", "b"), "field": "c"}], ids=str)
def test_bad_pairs_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(nogemm.ConfigError, match="pair"):
        DistilOptions(**changes)
