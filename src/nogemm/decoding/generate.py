"""Generate tokens with a converted head: searched for, proven, and taken back where the proof finds another one.

Legend: B sequences, L tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nogemm.convert.head import find_head
from nogemm.decoding.choosing import Chooser
from nogemm.decoding.ending import Ending
from nogemm.decoding.sampling import Sampling
from nogemm.decoding.states import Decoder, Mark
from nogemm.errors import ConfigError
from nogemm.heads import HireHead
from nogemm.models.inner import inner_model

Streamer = Callable[[Tensor], None]


@dataclass
class GenerationReport:
    """What a call of `generate` did; given to it empty.

    Attributes:
        tokens: new tokens of all sequences.
        rows: of the head, computed exactly for each state that a token was searched for or proven of.
        dense: states whose logits were all computed, because top_k, top_p or capped logits of a sample need them.
        proofs, differences: of mode "deferred": how many times tokens were proven together, and how many of these
            found another token than the search had.
        prompt_seconds, seconds: until the first token is there; from there to the last.
    """

    tokens: int = 0
    rows: list[int] = field(default_factory=list)
    dense: int = 0
    proofs: int = 0
    differences: int = 0
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first ones, in a second; 0 if there were none."""
        return 0.0 if self.seconds <= 0 else max(0, self.tokens - 1) / self.seconds


def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int = 20,
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Streamer | None = None,
    draft_streamer: Streamer | None = None,
    cache: Any = None,
    report: GenerationReport | None = None,
) -> Tensor:
    """Continue prompts with a model whose head `nogemm.convert_head` has converted.

    Greedy tokens (the default) are the argmax of the head's logits, accumulated in float32 over the weights as stored,
    ties to the lowest index. Sampled tokens are

        token = argmax_v  logit[v] + temperature noise[v]

    over the tokens that top_k and top_p leave, with Gumbel noise that seed, place in the text and sequence fix. In the
    head's mode "exact" each token is proven as it is chosen. In mode "deferred" tokens are searched for and proven some
    at a time: the cache goes back to the first one that differs, so the text is the same. In modes "high_recall" and
    "fast" they are searched for. A model's generation config gives the end token; its penalties, forced tokens and
    other processors are not applied.

    Args:
        input_ids: int64 [B, L], L at least 1; shorter prompts are padded on the left, with `attention_mask` 0 there.
        max_new_tokens: N, at least 0.
        seed: of the noise; None: drawn from torch's generator.
        eos_token_id: ends a sequence; None: what the model's generation config names. [] never ends.
        pad_token_id: what follows the end of a sequence while others go on; None: the model's, or the end token.
        stop_strings: end a sequence behind the token that completes one of them in its new text; need `tokenizer`.
        streamer: called with the new tokens [B] of every step, once they stay.
        draft_streamer: called with searched tokens at once; those from one that differs on are in vain.
        cache: transformers' cache of keys and values to go on from. It holds all tokens but the last of `input_ids`, or
            a part of them, and then all but the last of what is returned. Another call goes on from there, greedy or
            with the same seed as one call would have. After an interruption it holds all but the last token that
            `streamer` was given.
        report: filled in.
    Returns:
        int64 [B, L + N] at most: prompts and new tokens.
    Raises:
        ConfigError: the head is not converted or has hooks, the model is no causal one with a cache of keys and values,
            an argument is out of range, or the prompt and N do not fit the model's positions or the cache.
        NotFiniteError: a state is NaN or infinite; no token is made up.
    Cost: per token the model without its head, and `head_argmax` or `head_search`; per call one pass over the head,
        which notices weights that were changed behind torch's back; for the first call with a model five short runs.
    """
    inner: Any = inner_model(model)
    head = find_head(inner)
    if head is None:
        raise ConfigError("generate: the model's head is dense; call nogemm.convert_head(model) first")
    sampling = Sampling(temperature, top_k, top_p, seed) if do_sample else None
    _check_model(inner, head)
    _check(inner, input_ids, attention_mask, max_new_tokens)
    ending = Ending(inner, eos_token_id, pad_token_id, stop_strings, tokenizer)
    report = GenerationReport() if report is None else report
    if max_new_tokens == 0:
        return input_ids.clone()
    with torch.inference_mode():
        decoder = Decoder(inner, head, input_ids, cache)
        chooser = Chooser(head, sampling, decoder.scaling)
        if not chooser.needs_all or head.config.mode != "exact":
            head.refresh()
        padded = attention_mask is not None and not bool(attention_mask.all())
        mask = attention_mask if padded else None
        run = _Run(decoder, chooser, ending, input_ids, mask, max_new_tokens, draft_streamer, report)
        return run.all(streamer)


class _Run:
    """One call of `generate`: windows of tokens, each proven at its end, or of one token."""

    def __init__(
        self,
        decoder: Decoder,
        chooser: Chooser,
        ending: Ending,
        ids_BL: Tensor,
        mask: Tensor | None,
        count: int,
        draft: Streamer | None,
        report: GenerationReport,
    ) -> None:
        self.decoder, self.chooser, self.ending, self.draft, self.report = decoder, chooser, ending, draft, report
        self.ids, self.left, self.length = ids_BL, count, ids_BL.shape[1]
        self.mask = None if mask is None else torch.cat((mask, mask.new_ones(len(mask), count)), 1)
        config = chooser.head.config
        self.window = 1
        if config.mode == "deferred":
            most = decoder.longest_rewind
            if most == 0:
                raise ConfigError("generate: mode 'deferred' needs a cache that can go back, such as DynamicCache")
            self.window = min(config.verify_every, most)

    def all(self, streamer: Streamer | None) -> Tensor:
        """Return prompts and new tokens."""
        ids, steps = self.ids, self._steps()
        try:
            for token in steps:
                ids = torch.cat((ids, token.unsqueeze(1)), 1)
                if streamer is not None:
                    streamer(token)
        finally:
            steps.close()  # the cache goes back to what was streamed
            self.report.rows += self.chooser.rows
            self.report.dense += self.chooser.dense
        return ids.clone()

    def _steps(self) -> Generator[Tensor, None, None]:
        """Yield the next token of each sequence until all have ended."""
        start = time.perf_counter()
        fresh = self.ids[:, min(self.decoder.length, self.length - 1) :]
        done = torch.zeros(len(self.ids), dtype=torch.bool)
        while self.left > 0 and not bool(done.all()):
            tokens, mark = self._take(fresh, done)
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
                try:
                    yield token
                except BaseException:
                    mark.rewind(step)
                    raise
                if bool(done.all()):  # by a string: the tokens behind are in vain
                    mark.rewind(step)
                    return

    def _take(self, fresh: Tensor, done: Tensor) -> tuple[list[Tensor], Mark]:
        """Choose the tokens of a window; return them, and a mark behind what gave the first one."""
        before = mark = self.decoder.mark()
        states: list[Tensor] = []
        tokens: list[Tensor] = []
        over = [done]
        try:
            for step in range(min(self.window, self.left)):
                length = self.length + step
                states.append(self.decoder.states(fresh, None if self.mask is None else self.mask[:, :length]))
                if step == 0:
                    mark = self.decoder.mark()
                tokens.append(torch.where(over[-1], self.ending.pad, self.chooser.first(states[-1], length)))
                if self.draft is not None:
                    self.draft(tokens[-1])
                over.append(over[-1] | torch.isin(tokens[-1], self.ending.ends))
                fresh = tokens[-1].unsqueeze(1)
                if bool(over[-1].all()):
                    break
            if self.chooser.head.config.mode == "deferred":
                tokens = self._prove(states, tokens, over)
        except BaseException:
            before.rewind()
            raise
        mark.rewind(len(tokens) - 1)
        return tokens, mark

    def _prove(self, states: list[Tensor], tokens: list[Tensor], over: list[Tensor]) -> list[Tensor]:
        """Return the tokens up to the first that is not the dense head's, which takes its place."""
        steps, sequences = len(tokens), len(tokens[0])
        places = [self.length + step for step in range(steps) for _ in range(sequences)]
        proven = self.chooser.proven(torch.cat(states), places, list(range(sequences)) * steps).view(steps, sequences)
        proven = torch.where(torch.stack(over[:steps]), self.ending.pad, proven)
        differs = (proven != torch.stack(tokens)).any(1)
        self.report.proofs += 1
        if not bool(differs.any()):
            return tokens
        self.report.differences += 1
        first = int(differs.int().argmax())
        return [*tokens[:first], proven[first]]


def _check_model(model: Any, head: HireHead) -> None:
    if model.training:
        raise ConfigError("generate: the model is in training mode; call model.eval() first")
    if head._forward_hooks or head._forward_pre_hooks:
        raise ConfigError("generate: the head has forward hooks, which would not be called; remove them")


def _check(model: Any, ids: Tensor, mask: Tensor | None, count: int) -> None:
    if not isinstance(ids, Tensor):
        raise ConfigError(f"generate: input_ids must be a tensor int64 [B, L], got {type(ids).__name__}")
    if ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32) or ids.shape[0] < 1:
        raise ConfigError(f"generate: input_ids must be int64 [B, L], got {ids.dtype} {tuple(ids.shape)}")
    if ids.shape[1] < 1:
        raise ConfigError("generate: the prompt is empty; give at least the token that begins a text")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ConfigError(f"generate: max_new_tokens must be an integer of at least 0, got {count!r}")
    rows = model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= rows:
        raise ConfigError(f"generate: input_ids must be from 0 to {rows - 1}, got {int(ids.min())} to {int(ids.max())}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and limit > 0 and ids.shape[1] + count > limit:
        raise ConfigError(
            f"generate: {ids.shape[1]} tokens and max_new_tokens={count} are more than the model's {limit} positions"
        )
    if mask is None:
        return
    ones = mask.shape == ids.shape and bool(((mask == 0) | (mask == 1)).all()) and bool((mask[:, -1] == 1).all())
    if not ones or bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ConfigError("generate: attention_mask must be like input_ids, 0 for the padding on the left and then 1")
