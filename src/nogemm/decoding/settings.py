"""What a model's generation config asks for, and the logits processors that transformers makes of it.

Legend: B sequences, L tokens of the prompt, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nogemm.decoding.ending import Ending
from nogemm.decoding.sampling import Sampling
from nogemm.errors import ConfigError, NotFiniteError

Processor = Callable[[Tensor, Tensor], Tensor]

# Settings of a generation config that make another text, or more of them.
_OTHER_TEXTS = (
    "num_beams",
    "num_beam_groups",
    "num_return_sequences",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "token_healing",
)
# Settings that ask for an end, a speed, a memory or a kind of answer that there is not here.
_NOT_DONE = (
    "max_time",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "cache_implementation",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
_USUAL = ("hybrid", "dynamic")  # caches: what a decoder has here


def check_settings(config: Any) -> None:
    """Hold a generation config against what can be done.

    Raises:
        ConfigError: a setting makes another text.
    """
    if named := _named(config, _OTHER_TEXTS):
        raise ConfigError(
            f"generate: {named} of the model's generation config is not supported; set it to None there, or use the "
            "model's own generate"
        )
    if named := _named(config, _NOT_DONE):
        warnings.warn(f"generate: {named} of the model's generation config is not used", stacklevel=3)


def _named(config: Any, names: Sequence[str]) -> str:
    values = {name: getattr(config, name, None) for name in names}
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if _asks(value))


def _asks(value: Any) -> bool:
    return value is True or bool(value and value != 1 and value not in _USUAL)


class Processors:
    """The logits processors of one call: transformers' own, made of the model's generation config, and the caller's.

    Args:
        processors: functions of the tokens so far [B, T] and scores [B, V] that return scores.
        sampling: None: greedy. A sample is drawn from the scores as they are, temperature, top_k and top_p included.
    Attributes:
        names: of the processors.
    """

    def __init__(self, processors: Sequence[Processor], sampling: Sampling | None) -> None:
        self.processors, self.sampling = processors, sampling
        self.names = [_name(processor) for processor in processors]

    def __bool__(self) -> bool:
        return bool(self.processors)

    def choose(self, ids_BT: Tensor, logits_BV: Tensor, done_B: Tensor | None) -> Tensor:
        """Return the token of each sequence behind T tokens: of the largest score, ties to the lowest index.

        Args:
            done_B: sequences that have ended, whose token does not matter.
        Raises:
            NotFiniteError: the logits of a sequence are not finite, its scores are NaN, or no token is left.
            ConfigError: a processor returns something else than scores.
        """
        place = ids_BT.shape[1]
        finite = logits_BV.isfinite().all(1)
        _check_finite(finite, done_B, f"the logits of sequence {{}} before token {place} are not finite")
        scores_BV = logits_BV
        for processor, name in zip(self.processors, self.names, strict=True):
            scores_BV = processor(ids_BT, scores_BV)
            if not isinstance(scores_BV, Tensor) or scores_BV.shape != logits_BV.shape:
                got = tuple(scores_BV.shape) if isinstance(scores_BV, Tensor) else type(scores_BV).__name__
                raise ConfigError(
                    f"generate: the logits processor {name} must return scores of the shape {tuple(logits_BV.shape)}, "
                    f"got {got}"
                )
        fine = (scores_BV.amax(1) > -torch.inf) & ~scores_BV.isnan().any(1)
        _check_finite(fine, done_B, f"the logits processors leave sequence {{}} no token for position {place}")
        if self.sampling is not None:
            scores_BV = scores_BV + self.sampling.noise(
                scores_BV.shape[1], [place] * len(ids_BT), range(len(ids_BT)), self.sampling.temperature
            )
        return scores_BV.argmax(1)


def _check_finite(fine_B: Tensor, done_B: Tensor | None, words: str) -> None:
    broken = ~fine_B if done_B is None else ~fine_B & ~done_B
    if bool(broken.any()):
        raise NotFiniteError(words.format(int(broken.int().argmax())))


def _name(processor: Any) -> str:
    return getattr(processor, "__name__", None) or type(processor).__name__


def make_processors(
    model: Any,
    ids_BL: Tensor,
    mask_BL: Tensor | None,
    count: int,
    ending: Ending,
    sampling: Sampling | None,
    own: Sequence[Processor] | None,
) -> Processors:
    """Return the processors that a call needs; none where the config and the caller ask for none.

    Args:
        count: of new tokens.
        ending: of the texts.
        own: the caller's.
    Raises:
        ConfigError: transformers refuses a setting, or `own` is no list of functions.
    """
    if own is not None and (not isinstance(own, Sequence) or not all(callable(each) for each in own)):
        raise ConfigError(f"generate: logits_processor must be a list of functions of tokens and scores, got {own!r}")
    config = getattr(model, "generation_config", None)
    if config is None:
        return Processors(list(own or ()), sampling)
    config = copy.deepcopy(config)
    # Scores that are normalised have the same largest one, and what is not finite is an error here.
    config.renormalize_logits = config.remove_invalid_values = None
    config.suppress_tokens = config.suppress_tokens or None
    config.begin_suppress_tokens = config.begin_suppress_tokens or None
    config.eos_token_id, config.do_sample = ending.ends.tolist() or None, sampling is not None
    config.max_new_tokens, config.max_length = count, ids_BL.shape[1] + count
    config.temperature = config.top_k = config.top_p = None  # `Sampling` draws by them, unless there are others
    made = _of_transformers(model, config, ids_BL, mask_BL, own)
    if made and sampling is not None:  # they come before temperature, top_k and top_p, or behind
        config.temperature, config.top_k, config.top_p = sampling.temperature, sampling.top_k, sampling.top_p
        made = _of_transformers(model, config, ids_BL, mask_BL, own)
    return Processors(made, sampling)


def _of_transformers(model: Any, config: Any, ids_BL: Tensor, mask_BL: Tensor | None, own: Any) -> list[Processor]:
    mask = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
    try:
        model._prepare_special_tokens(config, True, device=ids_BL.device)
        made = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=ids_BL.shape[1],
            encoder_input_ids=ids_BL,
            prefix_allowed_tokens_fn=None,
            logits_processor=_list_of(own),
            device=ids_BL.device,
            model_kwargs={"attention_mask": mask},
        )
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise ConfigError(f"generate: the model's generation config makes no logits processors: {error}") from error
    return list(made)


def _list_of(own: Any) -> Any:
    from transformers import LogitsProcessorList

    return LogitsProcessorList(own or ())
