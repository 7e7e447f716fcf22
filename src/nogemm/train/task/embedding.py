"""The trainer of embeddings: sentence-transformers' own, and its contrastive loss.

    loss = mean over pairs of -log softmax_j(cos(a_i, b_j) / temperature)[i],  j over the pairs of the whole batch

Legend: B pairs, D width of an embedding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn
from transformers import TrainingArguments

from nogemm.train.task.corpus import Part
from nogemm.train.task.metrics import document_ranks
from nogemm.train.task.run import FinetuneRun
from nogemm.train.task.trainer import RowTrainer

EMBEDDING = "sentence_embedding"
COLUMNS = ("text", "text2")


class EmbeddingTrainer(RowTrainer, SentenceTransformerTrainer):
    """Trains a SentenceTransformer on pairs of texts that belong together; made by `finetune`.

    The pairs of all processes are compared with each other. With `micro_batch` the embeddings of a batch are computed
    piece by piece, and once more for their gradients (GradCache), which changes nothing but rounding.
    """

    def __init__(self, model: Any, arguments: TrainingArguments, run: FinetuneRun) -> None:
        scale, size = 1.0 / run.options.temperature, run.options.micro_batch
        together = arguments.world_size > 1
        loss: nn.Module
        if size is None or size >= run.options.batch:
            loss = MultipleNegativesRankingLoss(model, scale=scale, gather_across_devices=together)
        else:
            loss = CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=size)
        super().__init__(model, arguments, run, loss=loss)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leave the model card as it is: the report says what was trained."""

    def micro_batch(self, step: int, part: int) -> dict[str, Any]:
        """Return this process's pairs of a step, under the names that the loss looks for."""
        rows, train = self.micro_rows(step, part), self.corpus.parts["train"]
        return {
            f"{name}_{key}": value
            for column, name in enumerate(COLUMNS)
            for key, value in train.inputs(rows, column).items()
        }

    def answered(self, rows: Part, count: int) -> np.ndarray:
        """Return the rank of each first text's second one among all second texts."""
        sides = []
        for column in range(len(COLUMNS)):
            out = np.zeros((count, self.inner.get_embedding_dimension()), np.float32)  # type: ignore[operator]
            for some, inputs in self.shared(rows, count, column):
                with self.compute_loss_context_manager():
                    out[some] = self.inner(inputs)[EMBEDDING].float().cpu().numpy()
            sides.append(self.gathered(out))
        if not all(np.isfinite(side).all() for side in sides):
            return np.full(count, np.nan)  # the caller says so
        assert rows.targets is not None
        return document_ranks(sides[0], sides[1], rows.targets[:count])
