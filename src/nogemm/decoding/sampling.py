"""Sampling by noise that is fixed before the logits are known.

Adding Gumbel noise to logits and taking the largest draws from their softmax. The noise depends on seed, place and
sequence alone, so two ways to the same logits give the same token, and a largest sum can be proven as a largest logit.

Legend: B sequences, N places in sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogemm.config import check_int
from nogemm.errors import ConfigError, NotFiniteError

NAMED = ("temperature", "top_k", "top_p")  # what a generation config says of sampling, too


class Sampling:
    """How tokens are drawn.

    Args:
        temperature: above 0; 1, or None, draws from the model's own distribution.
        top_k: only the k largest logits of a sequence, ties with the last of them included; None or 0: all.
        top_p: only the largest that together have this share of the probability, after temperature and top_k; None:
            all.
        seed: of the noise; None: drawn from torch's generator.
    """

    def __init__(self, temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> None:
        for name, value, high in (("temperature", temperature, math.inf), ("top_p", top_p, 1.0)):
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= high and math.isfinite(value)):
                wanted = "a finite number above 0" if high == math.inf else "above 0 and at most 1"
                raise ConfigError(f"generate: {name} must be {wanted}, got {value!r}")
        if top_k is not None:
            check_int("generate", "top_k", top_k, 0)
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.top_k, self.top_p = top_k or None, None if top_p == 1 else top_p
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise ConfigError(f"generate: seed must be an integer, got {seed!r}")
        self.seed = int(torch.randint(2**31, ())) if seed is None else seed

    @property
    def plain(self) -> bool:
        """Whether every token may be drawn."""
        return self.top_k is None and self.top_p is None

    def noise(self, count: int, places: Sequence[int], rows: Sequence[int], scale: float = 1.0) -> Tensor:
        """Return noise float32 [N, V] for logits that are `scale` times too small, for N places in N sequences."""
        pairs = zip(places, rows, strict=True)
        noise_NV = torch.stack([gumbel(count, self.seed, place, row) for place, row in pairs])
        return noise_NV.mul_(self.temperature / scale)

    def draw(self, logits_NV: Tensor, places: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Draw one token for each of N places in N sequences, int64 [N]."""
        finite = logits_NV.isfinite().all(1)
        if not bool(finite.all()):
            raise NotFiniteError(f"the logits of sequence {rows[int((~finite).int().argmax())]} are not finite")
        barred_NV = self.allowed(logits_NV / self.temperature) == -torch.inf
        scores_NV = logits_NV + self.noise(logits_NV.shape[1], places, rows)
        return scores_NV.masked_fill(barred_NV, -torch.inf).argmax(1)

    def allowed(self, scores_BV: Tensor) -> Tensor:
        """Set the scores of tokens that may not be drawn to minus infinity."""
        if self.top_k is not None and self.top_k < scores_BV.shape[1]:
            least = scores_BV.topk(self.top_k, 1).values[:, -1:]
            scores_BV = scores_BV.masked_fill(scores_BV < least, -torch.inf)
        if self.top_p is not None:
            scores_BV = scores_BV.masked_fill(~nucleus(scores_BV, self.top_p), -torch.inf)
        return scores_BV


def make_sampling(do_sample: bool, config: Any = None, **choices: Any) -> Sampling | None:
    """Return how tokens are drawn; None: they are not.

    Args:
        config: the model's generation config, or None: it says what a choice that is None stands for.
        choices: temperature, top_k, top_p and seed, see `Sampling`.
    Raises:
        ConfigError: one is out of range, or would have no effect because nothing is drawn.
    """
    if do_sample:
        asked = Sampling(**choices)
        named = {name: getattr(config, name, None) for name in NAMED if choices[name] is None}
        try:
            return Sampling(**{**choices, **named, "seed": asked.seed})
        except ConfigError as error:
            raise ConfigError(f"{error}; the model's generation config names it") from error
    for name, value in choices.items():
        if value is not None and not (name == "temperature" and value == 1):
            raise ConfigError(f"generate: {name}={value!r} needs do_sample=True; without it no token is drawn")
    return None


def nucleus(scores_NV: Tensor, share: float) -> Tensor:
    """Say which tokens top_p leaves, bool [N, V]: the most likely ones that together have the share."""
    ranked, order = scores_NV.sort(dim=1, descending=True, stable=True)
    shares = ranked.softmax(1)
    return torch.zeros_like(shares, dtype=torch.bool).scatter(1, order, shares.cumsum(1) - shares < share)


def gumbel(count: int, seed: int, place: int, row: int) -> Tensor:
    """Return `count` numbers of Gumbel's distribution, the same for the same three numbers, float32 and finite.

        g = -log(-log(1 - w)),  w uniform, small ones as fine as large ones

    Cost: about 4 ns a number.
    """
    words = np.random.SFC64([seed % 2**64, place, row]).random_raw((count + 1) // 2)
    w = torch.from_numpy(words.view(np.uint32)[:count].astype(np.float32))
    w = w.add_(0.5).mul_(2.0**-32).clamp_max_(1 - 2.0**-24)
    return w.neg_().log1p_().neg_().log_().neg_()
