"""Generate tokens with a converted head: searched for, proven, and taken back where the proof finds another one.

Legend: B sequences, L tokens of the prompt, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nogemm.convert.head import find_head
from nogemm.decoding.caches import Mark
from nogemm.decoding.checks import check_prompt
from nogemm.decoding.choosing import Chooser
from nogemm.decoding.ending import Ending
from nogemm.decoding.sampling import make_sampling
from nogemm.decoding.settings import Processor, Processors, check_settings, make_processors
from nogemm.decoding.states import Decoder, base_of
from nogemm.decoding.streaming import Streamer, check_streamers, streamed
from nogemm.decoding.windows import GenerationReport, Windows
from nogemm.errors import ConfigError
from nogemm.heads import HireHead
from nogemm.models.inner import inner_model


def generate(
    model: Any,
    input_ids: Tensor,
    max_new_tokens: int = 20,
    *,
    do_sample: bool | None = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    logits_processor: Sequence[Processor] | None = None,
    streamer: Streamer | None = None,
    draft_streamer: Callable[[Tensor], None] | None = None,
    cache: Any = None,
    report: GenerationReport | None = None,
) -> Tensor:
    """Continue prompts with a model whose head `nogemm.convert_head` has converted.

    Greedy tokens (the default) are the argmax of the head's logits, accumulated in float32 over the weights as stored,
    ties to the lowest index. Sampled tokens are

        token = argmax_v  logit[v] + temperature noise[v]

    over the tokens that top_k and top_p leave, with Gumbel noise that seed, place in the text and sequence fix. The
    head's mode says how they are found (`HeadConfig`); in "deferred" the cache goes back where a proof finds another
    token, so the text is that of "exact". Logits processors, those that transformers makes of the model's generation
    config and the caller's, need all logits: then every state gets them, in float32, in every mode.

    Args:
        input_ids: int64 [B, L], L at least 1; shorter prompts are padded on the left, with `attention_mask` 0 there.
        max_new_tokens: N, at least 0.
        do_sample: None: what the generation config names.
        temperature, top_k, top_p: only with `do_sample`; None: what the generation config names, or else 1, all tokens,
            all tokens. With 1, 0 and 1 every token may be drawn, whatever the config names.
        seed: of the noise, only with `do_sample`; None: drawn from torch's generator.
        eos_token_id: ends a sequence; None: what the model's generation config names. [] never ends.
        pad_token_id: what follows the end of a sequence while others go on; None: the model's, or the end token.
        stop_strings: end a sequence behind the token that completes one of them in its new text; need `tokenizer`.
            None: what the generation config names.
        logits_processor: functions of the tokens so far [B, T] and the scores [B, V] that return scores, such as
            transformers' `LogitsProcessorList`. They come behind those of the generation config.
        streamer: called with the new tokens [B] of every step, once they stay; or a streamer of transformers.
        draft_streamer: called with searched tokens at once; those from one that differs on are in vain.
        cache: transformers' cache of keys and values to go on from. It holds all tokens but the last of `input_ids`, or
            a part of them, and then all but the last of what is returned. Another call goes on from there, greedy or
            with the same seed as one call would have; processors take its `input_ids` for the prompt. After an
            interruption it holds all but the last token that `streamer` was given, or is refused.
        report: filled in.
    Returns:
        int64 [B, L + N] at most: prompts and new tokens.
    Raises:
        ConfigError: the head is not converted or has hooks, the model is no causal one with a cache of keys and values,
            an argument is out of range, the generation config asks for another way (beams), or the prompt and N do not
            fit the model's positions or the cache.
        NotFiniteError: a state is NaN or infinite; no token is made up.
    Cost: per token the model without its head, and `head_argmax` or `head_search`; with processors, `head_logits`. Per
        call one pass over the head, which notices changed weights; for the first call with a model five short runs.
    """
    inner, head = _checked_model(model)
    config, rows = getattr(inner, "generation_config", None), inner.get_input_embeddings().weight.shape[0]
    drawn = bool(getattr(config, "do_sample", None)) if do_sample is None else do_sample
    sampling = make_sampling(drawn, config, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    limit = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    mask = check_prompt(input_ids, attention_mask, max_new_tokens, rows, limit)
    check_streamers(streamer, draft_streamer)
    check_settings(config)
    ending = Ending(config, eos_token_id, pad_token_id, stop_strings, tokenizer, rows)
    head.same_call(prompt=input_ids, max_new_tokens=max_new_tokens, sampling=sampling and vars(sampling))
    processors = make_processors(inner, input_ids, mask, max_new_tokens, ending, sampling, logits_processor)
    if max_new_tokens == 0:
        with streamed(streamer, input_ids):
            return input_ids.clone()
    with torch.inference_mode():
        steps = _ModelSteps(inner, head, input_ids, cache, ending, processors)
        report = GenerationReport() if report is None else report
        return Windows(steps, ending, input_ids, mask, max_new_tokens, draft_streamer, report).all(streamer)


DEFERRED_SEQUENCES = 2
"""Up to which mode "deferred" defers: a proof of one state each of more sequences costs less than a search of each and
its share of a proof (`nogemm bench head --batch 1,2,3,4`)."""


class _ModelSteps:
    """Steps of a torch model with a converted head, see `Steps`."""

    def __init__(
        self, model: Any, head: HireHead, ids_BL: Tensor, cache: Any, ending: Ending, processors: Processors
    ) -> None:
        self.decoder = decoder = Decoder(model, head, ids_BL, cache)
        mode = head.config.mode
        self.deferred = mode == "deferred" and not processors and len(ids_BL) <= DEFERRED_SEQUENCES
        proves = not self.deferred and not head.config.approximate
        self.chooser = chooser = Chooser(head, processors.sampling, decoder.scaling, processors, proves=proves)
        if not chooser.needs_all or (not proves and not processors):
            head.refresh()
        self.processors, self.ending = processors, ending
        self.ids = ids_BL[:, : min(self.held, ids_BL.shape[1] - 1)].long()  # what the cache holds
        self.window = 1
        if self.deferred:
            most = decoder.longest_rewind
            if most == 0:
                raise ConfigError(
                    "generate: mode 'deferred' needs a cache that can go back token by token, such as a DynamicCache "
                    f"of keys and values; {decoder.fixed_layers} cannot: convert the head with mode 'exact'"
                )
            self.window = min(head.config.verify_every, most)

    @property
    def held(self) -> int:
        return self.decoder.length

    def step(self, fresh_BL: Tensor, mask_BT: Tensor | None, place: int) -> tuple[Tensor, Tensor]:
        states_BD = self.decoder.states(fresh_BL, mask_BT)
        if not self.processors:
            return states_BD, self.chooser.first(states_BD, place)
        self.ids = torch.cat((self.ids, fresh_BL), 1)
        return states_BD, self.chooser.processed(states_BD, self.ids, self.ending.done)

    def prove(self, states_ND: Tensor, places: Sequence[int], sequences: Sequence[int]) -> Tensor:
        return self.chooser.proven(states_ND, places, sequences)

    def mark(self) -> Mark:
        return self.decoder.mark()

    def account(self, report: GenerationReport) -> None:
        report.rows += self.chooser.rows
        report.dense += self.chooser.dense
        report.processors += self.processors.names


def _checked_model(model: Any) -> tuple[Any, HireHead]:
    """Return transformers' part of a model, and its head."""
    inner = inner_model(model)
    head = find_head(inner)
    if head is None:
        raise ConfigError("generate: the model's head is dense; call nogemm.convert_head(model) first")
    if inner.training:
        raise ConfigError("generate: the model is in training mode; call model.eval() first")
    if head._forward_hooks or head._forward_pre_hooks:
        raise ConfigError("generate: the head has forward hooks, which would not be called; remove them")
    base_of(inner)
    return inner, head
