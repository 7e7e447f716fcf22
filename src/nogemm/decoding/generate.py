"""Generate tokens with a converted head: searched for, proven, and taken back where the proof finds another one.

Legend: B sequences, L tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nogemm.convert.head import find_head
from nogemm.decoding.choosing import Chooser
from nogemm.decoding.ending import Ending
from nogemm.decoding.sampling import Sampling
from nogemm.decoding.states import Decoder, Mark
from nogemm.decoding.windows import GenerationReport, Streamer, Windows
from nogemm.errors import ConfigError
from nogemm.heads import HireHead
from nogemm.models.inner import inner_model


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
        steps = _ModelSteps(decoder, chooser)
        return Windows(steps, ending, input_ids, mask, max_new_tokens, draft_streamer, report).all(streamer)


class _ModelSteps:
    """Steps of a torch model with a converted head, see `Steps`."""

    def __init__(self, decoder: Decoder, chooser: Chooser) -> None:
        self.decoder, self.chooser = decoder, chooser
        config = chooser.head.config
        self.deferred = config.mode == "deferred"
        self.window = 1
        if self.deferred:
            most = decoder.longest_rewind
            if most == 0:
                raise ConfigError("generate: mode 'deferred' needs a cache that can go back, such as DynamicCache")
            self.window = min(config.verify_every, most)

    @property
    def held(self) -> int:
        return self.decoder.length

    def step(self, fresh_BL: Tensor, mask_BT: Tensor | None, place: int) -> tuple[Tensor, Tensor]:
        states_BD = self.decoder.states(fresh_BL, mask_BT)
        return states_BD, self.chooser.first(states_BD, place)

    def prove(self, states_ND: Tensor, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
        return self.chooser.proven(states_ND, places, sequences)

    def mark(self) -> Mark:
        return self.decoder.mark()

    def account(self, report: GenerationReport) -> None:
        report.rows += self.chooser.rows
        report.dense += self.chooser.dense


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
