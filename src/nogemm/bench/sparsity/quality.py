"""What a model is worth when its FFNs answer by their strongest neurons alone.

    causal language model   perplexity: exp of the mean -log p(token given those before it)   lower is better
    masked language model   pseudo-perplexity: exp of the mean loss at fixed masks            lower is better
    encoder without a head  agreement: mean cosine of a text's embedding with the dense one   higher is better

Legend: N tokens, D width, F neurons, B texts, L tokens of each, V vocabulary.
Reading order: `cut`, `Judge`, `judge_of`, the three measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.bench.sparsity.activity import strongest
from nogemm.bench.sparsity.samples import Samples, run
from nogemm.convert.sites import Site
from nogemm.errors import ConfigError
from nogemm.heads import output_embeddings
from nogemm.models.embed import embed, masked_losses
from nogemm.models.inner import inner_model

STRENGTH, ADDED = "strength", "added"


@contextmanager
def cut(sites: Sequence[Site], count: Callable[[Site], int], rank: str = STRENGTH) -> Iterator[None]:
    """Within the block each token of the sites is answered by its strongest neurons; the weights stay as they are.

    Args:
        count: how many neurons of a site answer.
        rank: "strength": by |act| of the branch that HireFFN ranks, known before the others are computed. "added": by
            |h_i| |down_i|, the length of what a neuron adds, which only a layer that computes all of them knows.
    """
    inputs: dict[str, Tensor] = {}
    handles = []

    def watch(site: Site) -> None:
        weights = site.weights()
        gate, bias = weights.get("gate.weight"), weights.get("gate.bias")
        down_norm_F = weights["down.weight"].float().norm(dim=0)
        act = ACTIVATIONS[site.activation]

        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[site.name] = args[0]

        def between(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            h, x = args[0], inputs.pop(site.name, None)
            keys = h.abs()
            if rank == ADDED:
                keys = keys.float() * down_norm_F
            elif gate is not None and x is not None:
                keys = act(F.linear(x, gate, bias)).abs()
            mask = strongest(keys.reshape(-1, keys.shape[-1]), count(site)).reshape(h.shape)
            return (h.masked_fill(~mask, 0.0), *args[1:])

        handles.append(site.up.register_forward_pre_hook(before))
        handles.append(site.down.register_forward_pre_hook(between))

    try:
        for site in sites:
            watch(site)
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Judge:
    """How a model is judged: the measure's name, its value for the model as it is now, and for the dense model.

    Attributes:
        measure: "perplexity", "pseudo-perplexity" or "agreement".
        higher: whether a larger value is a better model.
        tokens: that the value is a mean over; of an agreement texts.
    """

    measure: str
    value: Callable[[], float]
    dense: float
    tokens: int
    higher: bool = False


def judge_of(model: nn.Module, samples: Samples, tokenizer: Any, seed: int) -> Judge | str:
    """Choose the measure that fits a model and take it of the dense one, or say why there is none."""
    inner = inner_model(model)
    name = type(inner).__name__
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return f"{name} is an encoder and a decoder, for which no measure is defined here"
    if output_embeddings(inner) is None:
        if not samples.texts or not hasattr(inner, "config"):
            return f"{name} has no vocabulary head, and the data no texts to embed"
        return _agreement(model, samples, tokenizer)
    can = getattr(inner, "can_generate", None)
    if callable(can) and can():
        return _perplexity(inner, samples)
    if getattr(tokenizer, "mask_token_id", None) is None or not samples.texts:
        return f"{name} is a masked model; its measure needs texts and a tokenizer with a mask token"
    return _pseudo_perplexity(inner, samples, tokenizer, seed)


def _perplexity(inner: nn.Module, samples: Samples) -> Judge | str:
    counted = sum(int(_targets(batch).ne(-100).sum()) for batch in samples.batches if "input_ids" in batch)
    if counted == 0:
        return "no sample has two tokens, so there is nothing to predict"

    @torch.no_grad()
    def value() -> float:
        total = 0.0
        for batch in samples.batches:
            if "input_ids" in batch:
                logits_BLV = run(inner, batch).logits[:, :-1].float()
                loss = F.cross_entropy(logits_BLV.flatten(0, 1), _targets(batch).flatten(), reduction="sum")
                total += float(loss.double())
        return math.exp(total / counted) if total / counted < 700 else math.inf

    return Judge("perplexity", value, value(), counted)


def _targets(batch: dict[str, Tensor]) -> Tensor:
    """Return the token that each position has to predict, -100 where it is padding: int64 [B, L - 1]."""
    ids_BL, mask_BL = batch["input_ids"], batch.get("attention_mask")
    targets = ids_BL[:, 1:]
    return targets if mask_BL is None else targets.masked_fill(mask_BL[:, 1:] == 0, -100)


def _pseudo_perplexity(inner: nn.Module, samples: Samples, tokenizer: Any, seed: int) -> Judge:
    def losses() -> tuple[float, int]:
        sums, counts = masked_losses(inner, tokenizer, samples.texts, seed=seed)
        return float(sums.sum() / counts.sum()), int(counts.sum())

    dense, counted = losses()
    return Judge("pseudo-perplexity", lambda: math.exp(losses()[0]), math.exp(dense), counted)


def _agreement(model: nn.Module, samples: Samples, tokenizer: Any) -> Judge | str:
    def embedded() -> Tensor:
        return torch.from_numpy(embed(model, tokenizer, samples.texts))

    try:
        reference_ND = embedded()
    except (ConfigError, ValueError, TypeError) as error:
        return f"its texts cannot be embedded: {error}"

    def value() -> float:
        return float((embedded() * reference_ND).sum(1).double().mean())

    return Judge("agreement", value, value(), len(samples.texts), higher=True)
