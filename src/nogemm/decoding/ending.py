"""Where a text ends: at a token, or behind a string.

Legend: B sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nogemm.errors import ConfigError

SPARE = 8  # tokens decoded in front of those that could hold a stop string: characters may have several


class Ending:
    """Tells which sequences have ended.

    Args:
        config: the model's generation config, or None.
        ends: tokens; None: what the config names.
        pad: what follows an end; None: the config's, or the first end token.
        stop_strings: end a sequence once its new text holds one of them; None: the config's.
        tokenizer: for the strings.
        rows: of the model's embedding.
    Raises:
        ConfigError: an argument is no token or no text, or there is no tokenizer for the strings.

    Attributes:
        done: bool [B], which sequences have ended; None: none has a new token.
    """

    def __init__(
        self,
        config: Any,
        ends: int | Sequence[int] | Tensor | None,
        pad: int | None,
        stop_strings: str | Sequence[str] | None,
        tokenizer: Any,
        rows: int,
    ) -> None:
        listed = _tokens(getattr(config, "eos_token_id", None) if ends is None else ends)
        if ends is not None and (wrong := [end for end in listed if not 0 <= end < rows]):  # a config may say -1
            raise ConfigError(
                f"generate: eos_token_id must be tokens from 0 to {rows - 1}, got {wrong[0]}; [] never ends"
            )
        self.ends = torch.tensor(listed, dtype=torch.int64)
        self.pad = torch.tensor(_padding(config, pad, listed, rows))
        given = getattr(config, "stop_strings", None) if stop_strings is None else stop_strings
        strings = [given] if isinstance(given, str) else given or ()
        if not isinstance(strings, Sequence) or not all(isinstance(text, str) and text for text in strings):
            raise ConfigError(f"generate: stop_strings must be texts that are not empty, got {given!r}")
        if strings and not callable(getattr(tokenizer, "decode", None)):
            named = "" if stop_strings is not None else f"; the model's generation config names {given!r}"
            raise ConfigError(f"generate: stop_strings need the model's tokenizer{named}")
        self.strings, self.tokenizer = list(strings), tokenizer
        self.longest = max(map(len, strings), default=0) + SPARE
        self.texts: list[list[int]] = []
        self.done: Tensor | None = None

    def after(self, token_B: Tensor, done_B: Tensor) -> Tensor:
        """Return which sequences have ended behind one more token of each."""
        self.done = done_B = self._after(token_B, done_B)
        return done_B

    def _after(self, token_B: Tensor, done_B: Tensor) -> Tensor:
        done_B = done_B | torch.isin(token_B, self.ends)
        if not self.strings:
            return done_B
        if not self.texts:
            self.texts = [[] for _ in token_B]
        for sequence, token in enumerate(token_B.tolist()):
            if not bool(done_B[sequence]):
                tail = self.texts[sequence] = [*self.texts[sequence], token][-self.longest :]
                text = self.tokenizer.decode(tail)
                done_B[sequence] = any(string in text for string in self.strings)
        return done_B


def _tokens(given: Any) -> list[int]:
    """Return end tokens as a list, however they are given."""
    listed = given.tolist() if isinstance(given, Tensor) else given
    listed = [] if listed is None else [listed] if isinstance(listed, int) else listed
    whole = isinstance(listed, (list, tuple)) and all(type(end) is int for end in listed)
    if not whole:
        raise ConfigError(f"generate: eos_token_id must be a token or several, got {given!r}")
    return list(listed)


def _padding(config: Any, pad: Any, ends: list[int], rows: int) -> int:
    """Return what follows the end of a sequence; a token of the model, because it reads it while others go on."""
    if pad is not None:
        if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < rows:
            raise ConfigError(f"generate: pad_token_id must be a token from 0 to {rows - 1}, got {pad!r}")
        return pad
    own = getattr(config, "pad_token_id", None)
    return next((token for token in (own, *ends) if isinstance(token, int) and 0 <= token < rows), 0)
