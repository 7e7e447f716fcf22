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
        ends: tokens; None: what the model's generation config names.
        pad: what follows an end; None: the model's, or the first end token.
        stop_strings: end a sequence once its new text holds one of them.
        tokenizer: for the strings.
    """

    def __init__(
        self,
        model: Any,
        ends: int | Sequence[int] | None,
        pad: int | None,
        stop_strings: str | Sequence[str] | None,
        tokenizer: Any,
    ) -> None:
        config = getattr(model, "generation_config", None)
        own = getattr(config, "eos_token_id", None) if ends is None else ends
        listed = [] if own is None else [own] if isinstance(own, int) else list(own)
        if not all(isinstance(end, int) for end in listed):
            raise ConfigError(f"generate: eos_token_id must be a token or several, got {ends!r}")
        self.ends = torch.tensor(listed, dtype=torch.int64)
        filling = getattr(config, "pad_token_id", None) if pad is None else pad
        self.pad = torch.tensor(filling if filling is not None else listed[0] if listed else 0)
        strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if not all(isinstance(text, str) and text for text in strings):
            raise ConfigError(f"generate: stop_strings must be texts that are not empty, got {stop_strings!r}")
        if strings and not callable(getattr(tokenizer, "decode", None)):
            raise ConfigError("generate: stop_strings need the model's tokenizer")
        self.strings, self.tokenizer = strings, tokenizer
        self.longest = max(map(len, strings), default=0) + SPARE
        self.texts: list[list[int]] = []

    def after(self, token_B: Tensor, done_B: Tensor) -> Tensor:
        """Return which sequences have ended behind one more token of each."""
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
