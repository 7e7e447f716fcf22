"""Tokens one after the other, in windows that are proven at their end: the same loop for every engine.

Legend: B sequences, L tokens, T tokens so far, N states, D width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nogemm.decoding.ending import Ending
from nogemm.decoding.streaming import Streamer, streamed


@dataclass
class GenerationReport:
    """What a call of `generate` did; given to it empty.

    Attributes:
        tokens: new tokens of all sequences.
        rows: of the head, computed exactly for each state that a token was searched for or proven of.
        dense: states whose logits were all computed, because top_k, top_p or capped logits of a sample need them, or
            logits processors.
        processors: the names of these.
        proofs, differences: of mode "deferred": how many times tokens were proven together, and how many of these
            found another token than the search had.
        prompt_seconds, seconds: until the first token is there; from there to the last.
    """

    tokens: int = 0
    rows: list[int] = field(default_factory=list)
    dense: int = 0
    processors: list[str] = field(default_factory=list)
    proofs: int = 0
    differences: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first ones, in a second; 0 if there were none."""
        return 0.0 if self.seconds <= 0 else max(0, self.tokens - 1) / self.seconds


class Marked(Protocol):
    """A memory as it was."""

    def rewind(self, tokens: int = 0) -> None:
        """Go back to the mark and the first `tokens` behind it; where there are no more, nothing changes."""


class Steps(Protocol):
    """A model with a memory of the tokens so far, and its head.

    Attributes:
        deferred: whether tokens are proven later, some at a time.
        window: how many at a time; 1 where they are not.
    """

    deferred: bool
    window: int

    @property
    def held(self) -> int:
        """Tokens in the memory."""
        ...

    def step(self, fresh_BL: Tensor, mask_BT: Tensor | None, place: int) -> tuple[Tensor, Tensor]:
        """Run new tokens behind those of the memory; return the last states [B, D], and the token [B] for `place`.

        Args:
            mask_BT: of all tokens so far, 0 for padding; None: there is none.
        """
        ...

    def prove(self, states_ND: Tensor, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
        """Return the dense head's tokens [N] of states that `step` has returned."""
        ...

    def mark(self) -> Marked:
        """Remember the memory as it is, to go back to."""
        ...

    def account(self, report: GenerationReport) -> None:
        """Write down what was computed."""


class _Nowhere:
    """A mark behind which there are no more tokens: a window of one has none to take back."""

    def rewind(self, tokens: int = 0) -> None:
        pass


_NOWHERE: Marked = _Nowhere()


class Windows:
    """One call of `generate`: windows of tokens, each proven at its end, or of one token."""

    def __init__(
        self,
        steps: Steps,
        ending: Ending,
        ids_BL: Tensor,
        mask: Tensor | None,
        count: int,
        draft: Callable[[Tensor], None] | None,
        report: GenerationReport,
    ) -> None:
        self.steps, self.ending, self.draft, self.report = steps, ending, draft, report
        self.ids, self.left, self.length = ids_BL, count, ids_BL.shape[1]
        self.mask = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), count)), 1)

    def all(self, streamer: Streamer | None) -> Tensor:
        """Return prompts and new tokens."""
        ids, tokens = self.ids, self._tokens()
        try:
            with streamed(streamer, ids) as put:
                for token in tokens:
                    put(token)
                    ids = torch.cat((ids, token.unsqueeze(1)), 1)
        finally:
            tokens.close()  # the memory goes back to what was streamed
            self.steps.account(self.report)
        return ids.clone()

    def _tokens(self) -> Generator[Tensor, None, None]:
        """Yield the next token of each sequence until all have ended."""
        start = time.perf_counter()
        fresh = self.ids[:, min(self.steps.held, self.length - 1) :]
        done = torch.zeros(len(self.ids), dtype=torch.bool)
        while self.left > 0 and not bool(done.all()):
            given, before, behind = 0, self.steps.mark(), _NOWHERE
            try:
                tokens, behind = self._take(fresh, done)
                for step, chosen in enumerate(tokens):
                    token = torch.where(done, self.ending.pad, chosen)  # a string may have ended it within the window
                    first = self.report.tokens == 0
                    self.report.tokens += int((~done).sum())
                    done = self.ending.after(token, done)
                    self.left, self.length = self.left - 1, self.length + 1
                    now = time.perf_counter()
                    if first:
                        self.report.prompt_seconds, start = now - start, now
                    self.report.seconds = now - start
                    fresh = token.unsqueeze(1)
                    given = step + 1
                    yield token
                    if bool(done.all()):  # by a string: the tokens behind are in vain
                        behind.rewind(step)
                        return
            except BaseException:
                if given:
                    behind.rewind(given - 1)
                else:
                    before.rewind()
                raise

    def _take(self, fresh: Tensor, done: Tensor) -> tuple[list[Tensor], Marked]:
        """Choose the tokens of a window; return them, and a mark behind what gave the first one."""
        behind: Marked = _NOWHERE
        states: list[Tensor] = []
        tokens: list[Tensor] = []
        over = [done]
        steps = min(self.steps.window, self.left)
        for step in range(steps):
            length = self.length + step
            mask = None if self.mask is None else self.mask[:, :length]
            state, chosen = self.steps.step(fresh, mask, length)
            if step == 0 and steps > 1:
                behind = self.steps.mark()
            states.append(state)
            tokens.append(torch.where(over[-1], self.ending.pad, chosen))
            if self.draft is not None:
                self.draft(tokens[-1])
            over.append(over[-1] | torch.isin(tokens[-1], self.ending.ends))
            fresh = tokens[-1].unsqueeze(1)
            if bool(over[-1].all()):
                break
        if self.steps.deferred:
            tokens = self._prove(states, tokens, over)
        behind.rewind(len(tokens) - 1)
        return tokens, behind

    def _prove(self, states: list[Tensor], tokens: list[Tensor], over: list[Tensor]) -> list[Tensor]:
        """Return the tokens up to the first that is not the dense head's, which takes its place."""
        steps, sequences = len(tokens), len(tokens[0])
        places = [self.length + step for step in range(steps) for _ in range(sequences)]
        proven = self.steps.prove(torch.cat(states), places, list(range(sequences)) * steps).view(steps, sequences)
        proven = torch.where(torch.stack(over[:steps]), self.ending.pad, proven)
        differs = (proven != torch.stack(tokens)).any(1)
        self.report.proofs += 1
        if not bool(differs.any()):
            return tokens
        self.report.differences += 1
        first = int(differs.int().argmax())
        return [*tokens[:first], proven[first]]
