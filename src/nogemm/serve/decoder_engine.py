"""A worker's model for completions: a decoder in torch, or an exported one in OpenVINO, one text at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nogemm.convert.head import convert_head, find_head
from nogemm.decoding import generate
from nogemm.errors import ConfigError
from nogemm.export import OpenVINODecoder
from nogemm.models.loading import load_model, load_tokenizer
from nogemm.models.texts import positions
from nogemm.serve.kind import Kind
from nogemm.serve.pieces import TextPieces
from nogemm.serve.text_engines import packed_for_serving


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One completion.

    Attributes:
        ids: tokens of the prompt.
        new_tokens: at most.
        temperature: 0: the most likely token each time.
        top_p, seed: of a sample; None: all tokens, by chance.
        stops: strings that end the text.
    """

    ids: list[int]
    new_tokens: int
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()


class _Enough(Exception):
    """Ends a generation behind the token that is the last one."""


class DecoderEngine:
    """Continue prompts; a dense head is converted when it is loaded, which changes no token.

    Args:
        kind: what is loaded.
        dtype: rows of converted FFNs, where torch runs them.
        body: of `nogemm.pack`, where torch runs the model.
        threads: of the engine.
        share: whether workers beside this one pack the same model: then all map one copy from a file.
    Attributes:
        positions: tokens that prompt and completion may have together; None: no limit.
        samples: which settings of a sample it takes.
    """

    def __init__(self, kind: Kind, dtype: str, body: str | None, threads: int, share: bool = False) -> None:
        torch.set_num_threads(threads)
        self.tokenizer = load_tokenizer(kind.folder)
        self._generate: Callable[..., Tensor]
        if kind.engine == "openvino":
            decoder = OpenVINODecoder(kind.folder, threads=threads)
            self._generate, self._ends = decoder.generate, set(decoder.record["ends"])
            self.positions, self.samples = decoder.record["positions"] or None, ["temperature", "seed"]
        else:
            model: Any = load_model(kind.folder)
            if find_head(model) is None:
                convert_head(model)
            packed_for_serving(model, dtype, body, share)
            self._generate = lambda ids, count, **more: generate(model, ids, count, **more)
            named = getattr(model.generation_config, "eos_token_id", None)
            self._ends = set([named] if isinstance(named, int) else named or ())
            self.positions, self.samples = positions(model), ["temperature", "top_p", "seed"]
        self.vocabulary = len(self.tokenizer)
        first = next(iter(self.tokenizer("a").input_ids), 0)
        self._generate(torch.tensor([[first]]), 1)  # settings that cannot be followed are an error now

    def run(self, asked: Asked, say: Callable[[str, int], None], stopped: Callable[[], bool]) -> str:
        """Generate one completion; return why it ended: "stop", "length" or "cancelled".

        Args:
            say: called with text, perhaps none, and the number of its tokens.
            stopped: asked before every token, whether nobody waits any more.
        """
        pieces, ended = TextPieces(self.tokenizer, asked.ids, asked.stops), "length"

        def put(token_B: Tensor) -> None:
            nonlocal ended
            if stopped():
                ended = "cancelled"
                raise _Enough
            token = int(token_B[0])
            if token in self._ends:
                ended = "stop"
                say("", 1)
                return
            say(pieces.add(token), 1)
            if pieces.ended:
                raise _Enough

        with contextlib.suppress(_Enough):
            self._generate(torch.tensor([asked.ids]), asked.new_tokens, streamer=put, **self._settings(asked))
        if rest := pieces.end():
            say(rest, 0)
        return "stop" if pieces.ended else ended

    def _settings(self, asked: Asked) -> dict[str, Any]:
        if not asked.temperature:
            return {}
        if asked.top_p is not None and "top_p" not in self.samples:
            raise ConfigError("top_p is not offered by an exported decoder")
        chosen = {"temperature": asked.temperature, "seed": asked.seed}
        chosen |= {"top_p": asked.top_p} if asked.top_p is not None else {}
        return {"do_sample": True, **chosen}
