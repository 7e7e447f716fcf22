"""From tokens to text as it grows: whole characters alone, and nothing of a string that ends the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BEFORE = 6  # tokens of the prompt that are decoded along: some tokenizers drop the space in front of a first word
_HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer gives for some bytes of a character


class TextPieces:
    """Make text of a completion's tokens.

    Args:
        tokenizer: of the model.
        prompt: its token ids.
        stops: strings that end the text; none of one is given out.
    Attributes:
        ended: whether one of them came.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.tokenizer, self.stops, self.ended = tokenizer, tuple(stops), False
        self._ids = list(prompt[-_BEFORE:])
        self._begin, self._read = 0, len(self._ids)
        self._held = ""

    def add(self, token: int) -> str:
        """Take a token; return the text that is certain by now, perhaps none."""
        self._ids.append(token)
        before, text = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
        if len(text) <= len(before) or text.endswith(_HALF):
            return ""
        self._begin, self._read = self._read, len(self._ids)
        return self._certain(text[len(before) :])

    def end(self) -> str:
        """Return what was held back: half characters, and the beginning of a string that did not come."""
        if self.ended:
            return ""
        before, text = self._decode(self._ids[self._begin : self._read]), self._decode(self._ids[self._begin :])
        self._read = len(self._ids)
        rest = self._certain(text[len(before) :])
        if not self.ended:
            rest, self._held = rest + self._held, ""
        return rest

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _certain(self, piece: str) -> str:
        self._held += piece
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.ended = True
            return self._held[: min(places)]
        keep = max((_begun(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain


def _begun(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
