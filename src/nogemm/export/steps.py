"""How an exported decoder finds its tokens: proven as they are chosen, searched for and proven later, or by all logits.

The graph of an export proves each token. What else is asked of its head is put in its place when the graph is loaded:
the rows and codes stay those of the file, one copy of them for search and proof.

Legend: B sequences, L new tokens, T tokens so far, N states, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nogemm.decoding.sampling import Sampling
from nogemm.decoding.windows import GenerationReport
from nogemm.errors import NotFiniteError
from nogemm.export import decoder_graph as dg
from nogemm.export.memory import Mark, Memory


@dataclass(frozen=True, kw_only=True)
class HostHead:
    """The head of a loaded decoder.

    Attributes:
        exact: whether it is our operator; else its logits are all there.
        vocabulary: V.
        scale: what the model multiplies the head's logits by.
        noise: whether it takes noise.
        best: rows of a search; 0: every token is proven as it is chosen.
        every: tokens between two proofs.
        proof: request of `proof_graph`; None: every token is proven as it is chosen.
    """

    exact: bool
    vocabulary: int
    scale: float = 1.0
    noise: bool = False
    best: int = 0
    every: int = 1
    proof: Any = None


class HostSteps:
    """Steps of an exported decoder, see `nogemm.decoding.windows.Steps`."""

    def __init__(self, memory: Memory, head: HostHead, sampling: Sampling | None) -> None:
        self.memory, self.head, self.sampling = memory, head, sampling
        self.deferred = head.proof is not None
        self.window = head.every
        self.rows: list[int] = []

    @property
    def held(self) -> int:
        return self.memory.length

    def mark(self) -> Mark:
        return self.memory.mark()

    def account(self, report: GenerationReport) -> None:
        report.rows += self.rows

    def step(self, fresh_BL: Tensor, mask_BT: Tensor | None, place: int) -> tuple[Tensor, Tensor]:
        places, sequences = [place] * len(fresh_BL), range(len(fresh_BL))
        found = self.memory.run(fresh_BL, mask_BT, self._noise(places, sequences))
        states_BD = torch.empty(len(fresh_BL), 0)
        if not self.head.exact:
            token_B = self._of_logits(found[dg.LOGITS][:, -1], places, sequences)
        elif self.deferred:
            token_B = _whole(found[dg.TOKEN][:, -1])
            states_BD = torch.from_numpy(found[dg.STATE][:, -1].copy())  # the next step writes where this one did
            self.rows += [min(self.head.best, self.head.vocabulary)] * len(token_B)
        else:
            token_B = _whole(found[dg.TOKEN][:, -1])
            self.rows += found[dg.EXACT][:, -1].tolist()
        return states_BD, _finite(token_B, places, sequences)

    def prove(self, states_ND: Tensor, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
        found = self.head.proof.infer(
            {dg.STATE: states_ND.numpy(), **self._noise(places, sequences)}, share_inputs=True, share_outputs=True
        )
        named = {name: value for output, value in found.items() for name in output.get_names()}
        self.rows += named[dg.EXACT].tolist()
        return _finite(_whole(named[dg.TOKEN]), places, sequences)

    def _noise(self, places: Sequence[int], sequences: Sequence[int]) -> dict[str, np.ndarray]:
        if not self.head.noise:
            return {}
        if self.sampling is None:
            return {dg.NOISE: np.zeros((1, 1), np.float32)}
        noise_NV = self.sampling.noise(self.head.vocabulary, places, sequences, self.head.scale)
        return {dg.NOISE: noise_NV.numpy()}

    def _of_logits(self, logits_BV: np.ndarray, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
        self.rows += [logits_BV.shape[1]] * len(logits_BV)
        if self.sampling is not None:
            return self.sampling.draw(torch.from_numpy(logits_BV), places, sequences)
        best_B = logits_BV.argmax(1)  # a NaN, if there is one
        return torch.from_numpy(np.where(np.isfinite(logits_BV[np.arange(len(best_B)), best_B]), best_B, -1))


def _whole(tokens: np.ndarray) -> Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


def _finite(token_N: Tensor, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
    if int(token_N.min()) < 0:
        n = int((token_N < 0).int().argmax())
        raise NotFiniteError(
            f"the state of sequence {sequences[n]} at position {places[n] - 1} is not finite: it has no most likely "
            "token"
        )
    return token_N
