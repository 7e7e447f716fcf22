"""Generate tokens with a converted head: greedy ones by proof, sampled ones by noise that a seed fixes.

Legend: B sequences, L tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nogemm.convert.head import find_head
from nogemm.decoding.sampling import Sampling
from nogemm.decoding.states import Decoder
from nogemm.errors import ConfigError
from nogemm.heads import HireHead
from nogemm.models.inner import inner_model

Streamer = Callable[[Tensor], None]


@dataclass
class GenerationReport:
    """What a call of `generate` did; given to it empty.

    Attributes:
        tokens: new tokens of all sequences.
        rows: of the head, computed exactly for each step and sequence; of sampled tokens, all of them.
        prompt_seconds, seconds: until the first token; from there to the last.
    """

    tokens: int = 0
    rows: list[int] = field(default_factory=list)
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
    streamer: Streamer | None = None,
    cache: Any = None,
    report: GenerationReport | None = None,
) -> Tensor:
    """Continue prompts with a model whose head `nogemm.convert_head` has converted.

    Greedy tokens (the default) are the argmax of the head's logits, accumulated in float32 over the weights as stored,
    ties to the lowest index; each is proven, from a part of the head's bytes. Sampled tokens need all logits:

        token = argmax_v  logit[v] / temperature + noise[v]

    over the tokens that top_k and top_p leave, with Gumbel noise that seed, place in the text and sequence fix. A
    model's generation config gives the end token; its penalties, forced tokens and other processors are not applied.

    Args:
        input_ids: int64 [B, L], L at least 1; shorter prompts are padded on the left, with `attention_mask` 0 there.
        max_new_tokens: N, at least 0.
        seed: of the noise; None: drawn from torch's generator.
        eos_token_id: ends a sequence; None: what the model's generation config names. [] never ends.
        pad_token_id: what follows the end of a sequence while others go on; None: the model's, or the end token.
        streamer: called with the new tokens [B] of every step.
        cache: transformers' cache of keys and values to go on from. It holds all tokens but the last of `input_ids`, or
            a part of them, and then all but the last of what is returned. Another call goes on from there, greedy or
            with the same seed as one call would have.
        report: filled in.
    Returns:
        int64 [B, L + N] at most: prompts and new tokens.
    Raises:
        ConfigError: the head is not converted or has hooks, the model is no causal one with a cache of keys and values,
            an argument is out of range, or the prompt and N do not fit the model's positions or the cache.
        NotFiniteError: a state is NaN or infinite; no token is made up.
    Cost: per token the model without its head, and `head_argmax`; per call one pass over the head, which notices
        weights that were changed behind torch's back; for the first call with a model five more short runs of it.
    """
    inner: Any = inner_model(model)
    head = find_head(inner)
    if head is None:
        raise ConfigError("generate: the model's head is dense; call nogemm.convert_head(model) first")
    sampling = Sampling(temperature, top_k, top_p, seed) if do_sample else None
    _check_model(inner, head)
    _check(inner, input_ids, attention_mask, max_new_tokens)
    ends = _ends(inner, eos_token_id)
    pad = _pad(inner, pad_token_id, ends)
    report = GenerationReport() if report is None else report
    if max_new_tokens == 0:
        return input_ids.clone()
    with torch.inference_mode():
        decoder = Decoder(inner, head, input_ids, cache)
        if sampling is None:
            head.refresh()

        def choose(states: Tensor, place: int) -> Tensor:
            if sampling is not None:
                report.rows += [head.out_features] * len(states)
                return sampling.draw(decoder.scaling(head.logits(states)), place)
            choice = head.choose(states)
            report.rows += choice.rows.tolist()
            return choice.token

        mask = None if attention_mask is None or bool(attention_mask.all()) else attention_mask
        steps = _steps(decoder, choose, input_ids, mask, ends, pad, report)
        ids = input_ids
        for _, token in zip(range(max_new_tokens), steps, strict=False):
            ids = torch.cat((ids, token.unsqueeze(1)), 1)
            if streamer is not None:
                streamer(token)
    return ids.clone()


def _steps(
    decoder: Decoder,
    choose: Callable[[Tensor, int], Tensor],
    ids_BL: Tensor,
    mask: Tensor | None,
    ends: Tensor,
    pad: Tensor,
    report: GenerationReport,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, `pad` behind its end, until all have ended."""
    start = time.perf_counter()
    place = ids_BL.shape[1]
    fresh = ids_BL[:, min(decoder.length, place - 1) :]
    done = torch.zeros(len(ids_BL), dtype=torch.bool)
    while not bool(done.all()):
        token = torch.where(done, pad, choose(decoder.states(fresh, mask), place))
        first = report.tokens == 0
        report.tokens += int((~done).sum())
        done |= torch.isin(token, ends)
        fresh, place = token.unsqueeze(1), place + 1
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        now = time.perf_counter()
        if first:
            report.prompt_seconds, start = now - start, now
        report.seconds = now - start
        yield token


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


def _ends(model: Any, given: int | Sequence[int] | None) -> Tensor:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None) if given is None else given
    if own is None:
        own = []
    ends = [own] if isinstance(own, int) else list(own)
    if not all(isinstance(end, int) for end in ends):
        raise ConfigError(f"generate: eos_token_id must be a token or several, got {given!r}")
    return torch.tensor(ends, dtype=torch.int64)


def _pad(model: Any, given: int | None, ends: Tensor) -> Tensor:
    own = getattr(getattr(model, "generation_config", None), "pad_token_id", None) if given is None else given
    if own is None:
        own = int(ends[0]) if len(ends) else 0
    return torch.tensor(own)
