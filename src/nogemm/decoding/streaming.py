"""Who gets tokens as they come: a function, or a streamer of transformers.

Legend: B sequences, L tokens of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor

from nogemm.errors import ConfigError


@runtime_checkable
class TokenStreamer(Protocol):
    """What `TextStreamer` and `TextIteratorStreamer` of transformers are."""

    def put(self, value: Tensor) -> None:
        """Take the prompts [B, L] first, then the new tokens [B] of every step."""

    def end(self) -> None:
        """Take note that there are no more."""


Streamer = Callable[[Tensor], None] | TokenStreamer


def check_streamers(streamer: object, draft: object) -> None:
    """Raise ConfigError for what cannot take tokens."""
    if streamer is not None and not isinstance(streamer, TokenStreamer) and not callable(streamer):
        raise ConfigError(
            f"generate: streamer must be a function of tokens, or have put and end, got {type(streamer).__name__}"
        )
    if draft is not None and not callable(draft):
        raise ConfigError(f"generate: draft_streamer must be a function of tokens, got {type(draft).__name__}")


@contextmanager
def streamed(streamer: Streamer | None, ids_BL: Tensor) -> Generator[Callable[[Tensor], None], None, None]:
    """Yield what takes the new tokens of a step. A streamer of transformers has got the prompts by then.

    Its `end` is called behind an error, too: whoever reads the stream in another thread would wait for it for ever.
    """
    if streamer is None:
        yield lambda token: None
    elif isinstance(streamer, TokenStreamer):
        try:
            streamer.put(ids_BL)
            yield streamer.put
        finally:
            streamer.end()
    else:
        yield streamer
