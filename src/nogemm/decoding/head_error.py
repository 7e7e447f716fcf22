"""How far the tokens and the probabilities of a head are from the dense head's, on a model's own texts.

Legend: S states, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.activations import Sample
from nogemm.convert.head import find_head, head_states
from nogemm.decoding.sampling import nucleus
from nogemm.errors import ConfigError

TOGETHER = 16  # states at once: their logits are kept
TOP_P = 0.9


@dataclass(frozen=True)
class HeadError:
    """What a head's search and its estimates are worth.

    Attributes:
        states: S that were looked at.
        recall: share whose searched token is the dense head's.
        entropy: mean of the dense distributions', in nats; entropy_error: mean distance of the estimated ones' from it.
        divergence: mean Kullback-Leibler divergence of the estimated distribution from the dense one, in nats.
        log_prob_error: mean distance of the log-probability of the dense head's token.
        dense_perplexity, perplexity: exp of the mean of -log p by both, of one token a state, drawn from the dense
            distribution.
        top_p_error: mean distance of the dense probability of the tokens that top_p 0.9 leaves by the estimates, from
            that of the tokens that it leaves by the dense ones.
    """

    states: int
    recall: float
    entropy: float
    entropy_error: float
    divergence: float
    log_prob_error: float
    dense_perplexity: float
    perplexity: float
    top_p_error: float


def head_error(
    model: nn.Module, data: Iterable[Sample], *, tokenizer: Any = None, states: int = 1024, seed: int = 0
) -> HeadError:
    """Compare a converted head's search and estimates with all logits, on the states that it sees for some texts.

    Args:
        model: with a head by `nogemm.convert_head`, of any mode: what is measured are `HireHead.search` and `estimate`.
        data, tokenizer: as in `nogemm.convert_head`; other texts than the ones given there.
        states: S at most.
        seed: of the tokens that perplexity is taken of.
    Raises:
        ConfigError: the head is dense, or the data has no token.
    Cost: forward passes until S tokens are seen, and all logits of S states.
    """
    head = find_head(model)
    if head is None:
        raise ConfigError("head_error: the model's head is dense; call nogemm.convert_head(model) first")
    source = torch.Generator().manual_seed(seed)
    sums = torch.zeros(8, dtype=torch.float64)
    count = 0
    with torch.no_grad(), closing(head_states(model, head, data, tokenizer)) as seen:
        for part in seen:
            for x in part[: states - count].float().split(TOGETHER):
                sums += _compare(head.logits(x), head.estimate(x), head.search(x).token, source)
                count += len(x)
            if count >= states:
                break
    if not count:
        raise ConfigError("head_error: the data gave no token to the head; is it empty?")
    recall, entropy, off, divergence, log_prob, dense, own, top_p = (sums / count).tolist()
    return HeadError(count, recall, entropy, off, divergence, log_prob, math.exp(dense), math.exp(own), top_p)


def _compare(dense_NV: Tensor, own_NV: Tensor, token_N: Tensor, source: torch.Generator) -> Tensor:
    """Return the sums of what `HeadError` has means of, float64 [8]."""
    p, q = dense_NV.double().log_softmax(1), own_NV.double().log_softmax(1)
    best = dense_NV.argmax(1)
    entropy, other = (-(r.exp() * r).sum(1) for r in (p, q))
    drawn = torch.multinomial(p.exp(), 1, generator=source)
    mass = [(p.exp() * kept).sum(1) for kept in (nucleus(p, TOP_P), nucleus(q, TOP_P))]
    each = (
        (token_N == best).double(),
        entropy,
        (entropy - other).abs(),
        (p.exp() * (p - q)).sum(1),
        (p - q).gather(1, best.unsqueeze(1)).abs().squeeze(1),
        -p.gather(1, drawn).squeeze(1),
        -q.gather(1, drawn).squeeze(1),
        (mass[0] - mass[1]).abs(),
    )
    return torch.stack([value.sum() for value in each])
