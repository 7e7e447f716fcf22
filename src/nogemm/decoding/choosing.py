"""From states to tokens: searched for, proven, or drawn from all logits.

Legend: N states, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nogemm.decoding.sampling import Sampling
from nogemm.decoding.settings import Processors
from nogemm.decoding.states import Scaling
from nogemm.errors import NotFiniteError
from nogemm.heads import Choice, HireHead

How = Callable[[Tensor, Tensor | None], Choice]


class Chooser:
    """Chooses tokens by a head.

    A greedy token is the largest logit. A sampled one is the largest sum of logit and noise, so the same search and the
    same proof find it. Only top_k, top_p, capped logits and logits processors need all logits.

    Args:
        sampling: None: greedy.
        scaling: what the model does to the head's logits.
        processors: what is done to them then.
        proves: whether each token is proven as it is chosen; else it is searched for.
    Attributes:
        rows: of the head, computed exactly for each state so far.
        dense: states so far whose logits were all computed.
    """

    def __init__(
        self, head: HireHead, sampling: Sampling | None, scaling: Scaling, processors: Processors, *, proves: bool
    ) -> None:
        self.head, self.sampling, self.scaling, self.processors = head, sampling, scaling, processors
        self.proves = proves
        self.needs_all = bool(processors) or (sampling is not None and (not sampling.plain or scaling.cap is not None))
        self.rows: list[int] = []
        self.dense = 0

    def first(self, x_ND: Tensor, place: int) -> Tensor:
        """Choose a token for each sequence, at one place of the text: proven or searched for."""
        places, sequences = [place] * len(x_ND), list(range(len(x_ND)))
        if self.proves:
            return self.proven(x_ND, places, sequences)
        if self.needs_all:
            self.rows += [self.head.searched_rows] * len(x_ND)
            return self._draw(self.head.estimate(x_ND, self.head.searched_rows), places, sequences)
        return self._choose(self.head.search, x_ND, places, sequences)

    def proven(self, x_ND: Tensor, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
        """Choose the dense head's tokens of N states."""
        if self.needs_all:
            return self._draw(self._logits(x_ND), places, sequences)
        return self._choose(self.head.choose, x_ND, places, sequences)

    def processed(self, x_BD: Tensor, ids_BT: Tensor, done_B: Tensor | None) -> Tensor:
        """Choose a token for each sequence behind T tokens, from all logits and by the processors."""
        return self.processors.choose(ids_BT, self.scaling(self._logits(x_BD)), done_B)

    def _logits(self, x_ND: Tensor) -> Tensor:
        self.rows += [self.head.out_features] * len(x_ND)
        self.dense += len(x_ND)
        return self.head.logits(x_ND)

    def _choose(self, how: How, x_ND: Tensor, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
        noise_NV = None
        if self.sampling is not None:
            noise_NV = self.sampling.noise(self.head.out_features, places, sequences, self.scaling.scale)
        try:
            choice = how(x_ND, noise_NV)
        except NotFiniteError:
            n = int((~x_ND.isfinite().all(1)).int().argmax())
            raise NotFiniteError(
                f"the state of sequence {sequences[n]} before token {places[n]} is not finite: it has no next token"
            ) from None
        self.rows += choice.rows.tolist()
        return choice.token

    def _draw(self, logits_NV: Tensor, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
        assert self.sampling is not None
        return self.sampling.draw(self.scaling(logits_NV), places, sequences)
