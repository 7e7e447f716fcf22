"""Run a transformers encoder over texts: pooled embeddings, masked-token losses, predicted labels.

Texts are sorted by length and cut into batches of about equal padded size, so that little is spent on padding; the
results come back in the order of the texts. Nothing here knows which layers the model has.

Legend: N texts, L tokens in a batch's longest text, D embedding width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nogemm.models.pooling import Pooling, pooled, pooling_of
from nogemm.models.texts import accepted, encode, last_hidden, padded, prepare_tokenizer

BATCH_TOKENS = 4096
MAX_LENGTH = 256
Progress = Callable[[int, int], None]


def embed(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    pooling: Pooling | None = None,
    max_length: int = MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Embed texts: the last hidden states pooled as the model's directory says, by default their mean, of length one.

        e = m / |m|,  m = sum_l mask[l] h[l] / sum_l mask[l]

    Args:
        model: an encoder whose output has `last_hidden_state`; it is left in the mode it came in.
        texts: at least one.
        pooling: None: what `modules.json` describes where the model was loaded from, else the mean.
        max_length: longer texts are cut to this many tokens, or to what tokenizer, model and pooling allow.
        batch_tokens: padded tokens per batch, at most (one text always fits).
        progress: called with (texts done, texts in all) after every batch.
    Returns:
        float32 [N, D] in the order of `texts`; non-finite numbers are passed on, the figures refuse them.
    Raises:
        ValueError: if no text is given.
        ConfigError: `modules.json` describes something that cannot be followed.
    """
    how = pooling_of(model) if pooling is None else pooling
    max_length = min(max_length, how.max_length or max_length)

    def pool(inputs: dict[str, Tensor]) -> Tensor:
        return pooled(last_hidden(model, inputs).float(), inputs["attention_mask"], how)

    return _map_batches(model, tokenizer, texts, pool, max_length, batch_tokens, progress)


def logits(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """Return the logits of a sequence classifier, float32 [N, labels], in the order of `texts`."""
    return _map_batches(
        model, tokenizer, texts, lambda x: model(**x).logits.float(), max_length, batch_tokens, progress
    )


def masked_losses(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    share: float = 0.15,
    seed: int = 0,
    max_length: int = MAX_LENGTH,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum the loss at masked tokens of each text: -log p(token) in nats.

    In every text `share` of the ordinary tokens (at least one) are chosen; 80 % of the chosen become the mask token,
    10 % a random token, 10 % stay. The choice depends on the seed and the text's place in `texts` alone, so two models
    see the same holes whatever their batches.

    Returns:
        (loss sums, numbers of chosen tokens), one per text that has an ordinary token. MLM loss = ratio of the sums.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token: MLM loss needs a masked language model")
    special = torch.tensor(sorted(tokenizer.all_special_ids))

    def holes(inputs: dict[str, Tensor], order: list[int]) -> Tensor:
        ids = inputs["input_ids"]
        labels = torch.full_like(ids, -100)
        for row, place in enumerate(order):
            ordinary = torch.nonzero(~torch.isin(ids[row], special)).flatten().numpy()
            if ordinary.size == 0:
                continue
            rng = np.random.default_rng([seed, place])
            chosen = rng.choice(ordinary, size=max(1, round(share * ordinary.size)), replace=False)
            labels[row, chosen] = ids[row, chosen]
            kind = rng.random(chosen.size)
            ids[row, chosen[kind < 0.8]] = tokenizer.mask_token_id
            swap = chosen[(kind >= 0.8) & (kind < 0.9)]
            ids[row, swap] = torch.as_tensor(rng.integers(0, len(tokenizer), swap.size))
        return labels

    sums, counts = np.zeros(len(texts)), np.zeros(len(texts))
    with _evaluating(model):
        for order, inputs in batches(tokenizer, texts, max_length, batch_tokens, model):
            labels = holes(inputs, order)
            score_NLV = model(**inputs).logits.float()
            loss = nn.functional.cross_entropy(score_NLV.transpose(1, 2), labels, reduction="none")
            sums[order] = loss.sum(1).double().numpy()
            counts[order] = (labels != -100).sum(1).numpy()
            if progress is not None:
                progress(int((counts > 0).sum()), len(texts))
    used = counts > 0
    return sums[used], counts[used]


class _evaluating:
    """Hold a model in evaluation mode without gradients, and put it back as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.grad = model, torch.inference_mode()

    def __enter__(self) -> None:
        self.training = self.model.training
        if self.training:
            self.model.eval()
        self.grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.grad.__exit__(*error)
        if self.training:
            self.model.train()


def _map_batches(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    function: Callable[[dict[str, Tensor]], Tensor],
    max_length: int,
    batch_tokens: int,
    progress: Progress | None,
) -> NDArray[np.float32]:
    out: NDArray[np.float32] | None = None
    done = 0
    with _evaluating(model):
        for order, inputs in batches(tokenizer, texts, max_length, batch_tokens, model):
            rows = function(inputs).numpy()
            if out is None:
                out = np.empty((len(texts), rows.shape[1]), dtype=np.float32)
            out[order] = rows
            done += len(order)
            if progress is not None:
                progress(done, len(texts))
    if out is None:
        raise ValueError("no text was given")
    return out


def batches(
    tokenizer: Any, texts: Sequence[str], max_length: int, batch_tokens: int, model: nn.Module
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield (places in `texts`, padded inputs that the model takes), longest first so that memory peaks at once."""
    if len(texts) == 0:
        return
    prepare_tokenizer(tokenizer, model)
    encoded = encode(tokenizer, texts, max_length, model)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = sorted(range(len(texts)), key=lambda i: (-lengths[i], i))
    start = 0
    while start < len(order):
        count = max(1, batch_tokens // max(1, lengths[order[start]]))
        part = order[start : start + count]
        rows = [{name: encoded[name][i] for name in encoded} for i in part]
        yield part, accepted(model, padded(tokenizer, rows))
        start += count
