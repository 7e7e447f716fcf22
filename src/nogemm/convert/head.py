"""Give a language model a vocabulary head that finds its tokens in a part of its bytes."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.activations import Sample, batches_of, real_tokens
from nogemm.convert.checkpoint import attach, detach
from nogemm.errors import ConfigError
from nogemm.heads import HeadConfig, HeadReport, HireHead, check_head, head_of, output_embeddings, second_moment
from nogemm.layers._base import is_quantised
from nogemm.models.inner import inner_model

STATES, STATES_PER_WIDTH = 8192, 8  # that codes are fitted to: so many, and so many for each coordinate
CHUNK = 8192  # states whose moment is taken at once
SAMPLE = 2048  # states that the rows of "high_recall" are chosen on
UNSEEN = 4  # one batch of so many is kept from the codes: on states that they fit, a search finds too much


def convert_head(
    model: nn.Module,
    config: HeadConfig | None = None,
    data: Iterable[Sample] | None = None,
    *,
    tokenizer: Any = None,
) -> HireHead:
    """Replace the vocabulary head of a language model in place; its weights stay where they are, tied or not.

    Args:
        model: a causal or a masked language model of transformers.
        config: see `HeadConfig`.
        data: texts, or mappings of the model's keyword arguments: what the model will see. Codes that fit its states
            leave a tenth of the rows to compute. Mode "high_recall" needs it.
        tokenizer: for the texts; default: the one stored with the model.
    Returns:
        the head, which is now the model's `get_output_embeddings()`.
    Raises:
        ConfigError: the model has no vocabulary head, it is no plain linear layer or has hooks, it is converted
            already, a weight or a bias of it is not finite (the message names its row), mode "high_recall" has no data,
            or the model cannot run on `data`. The model is then unchanged.
    Cost: forward passes, without the head's product, until 8,192 tokens are seen, or eight times the head's width.
    The codes are made at the first use, see `make_codes`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"convert_head: expected a model, got {model!r}; load it first")
    config = HeadConfig() if config is None else config
    if not isinstance(config, HeadConfig):
        raise ConfigError(f"convert_head: expected a HeadConfig, got {config!r}")
    inner = inner_model(model)
    dense = dense_head(inner)
    assert isinstance(dense.weight, nn.Parameter)
    if not dense.weight.is_meta:
        check_head(dense.weight, dense.bias, "convert_head")
    if config.mode == "high_recall" and data is None:
        raise ConfigError("convert_head: mode 'high_recall' needs data, on which its rows are chosen")
    moment, unseen = (None, None) if data is None else _moment(model, dense, data, tokenizer, config)
    head = HireHead(config, dense.weight, dense.bias, moment)
    if unseen is not None:
        _calibrate(head, unseen)
    head.train(dense.training)
    inner.set_output_embeddings(head)  # type: ignore[operator]
    if head_of(inner) is not head:
        raise ConfigError(f"convert_head: {type(inner).__name__}.set_output_embeddings does not replace the head")
    attach(inner)
    return head


def find_head(model: nn.Module) -> HireHead | None:
    """Return the converted head of a transformers model, or of the one inside a SentenceTransformer, or None."""
    return head_of(inner_model(model))


def restore_head(model: nn.Module) -> nn.Linear:
    """Put a plain linear layer back in the place of a converted head; its weights stay where they are, tied or not.

    What the conversion added, codes and the second moment of the states, is freed. A model without converted FFNs is
    then saved as an ordinary one of transformers.

    Returns:
        the layer, which is now the model's `get_output_embeddings()`.
    Raises:
        ConfigError: the head is not converted, has hooks, or is a shard of `nogemm.shard_head`. The model is then
            unchanged.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"restore_head: expected a model, got {model!r}; load it first")
    inner: Any = inner_model(model)
    head, name = head_of(inner), type(inner).__name__
    if head is None:
        raise ConfigError(f"restore_head: the head of this {name} is not converted")
    if type(head) is not HireHead:
        raise ConfigError(f"restore_head: the head of this {name} is a {type(head).__name__}: load the model anew")
    if head._forward_hooks or head._forward_pre_hooks:
        raise ConfigError(f"restore_head: the head of {name} has forward hooks, which would be lost; remove them")
    dense = nn.Linear(head.in_features, head.out_features, bias=head.bias is not None, device="meta")
    dense.weight, dense.bias = head.weight, head.bias  # type: ignore[assignment]
    dense.train(head.training)
    inner.set_output_embeddings(dense)
    detach(inner)
    return dense


def head_report(model: nn.Module) -> HeadReport:
    """Say what the converted head of a model takes in memory, and whether its weights are the embedding's.

    Raises:
        ConfigError: the head is not converted.
    Cost: none; the codes are counted, not made.
    """
    inner: Any = inner_model(model)
    head = find_head(inner)
    if head is None:
        raise ConfigError("head_report: the model's head is dense; call nogemm.convert_head(model) first")
    return HireHead.report(head, tied=inner.get_input_embeddings().weight is head.weight)  # a shard reports traffic


def dense_head(inner: nn.Module) -> nn.Linear:
    """Return the head that can be converted, or say why there is none."""
    found = output_embeddings(inner)
    name = type(inner).__name__
    if isinstance(found, HireHead):
        raise ConfigError(f"convert_head: the head of this {name} is converted already")
    if found is None:
        raise ConfigError(
            f"convert_head: {name} has no vocabulary head; load a language model, such as AutoModelForCausalLM's"
        )
    if is_quantised(found) or type(found) is not nn.Linear:
        raise ConfigError(
            f"convert_head: the head of {name} is a {type(found).__name__}, not a plain linear layer: convert it "
            "before it is wrapped or quantised"
        )
    if found.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"convert_head: the head of {name} has weights of {found.weight.dtype}, not float32, bfloat16 or float16"
        )
    if found._forward_hooks or found._forward_pre_hooks:
        raise ConfigError(f"convert_head: the head of {name} has forward hooks, which would be lost; remove them")
    return found


class _HeadReached(Exception):
    """Leaves a model's forward pass where its head begins."""


def head_states(
    model: nn.Module, head: nn.Module, data: Iterable[Sample], tokenizer: Any = None
) -> Generator[Tensor, None, None]:
    """Run a model over samples, in evaluation mode, and yield what its head sees: [tokens, D], padding left out.

    Close it when it is left early: the model is then as it was. The head's own product, most of the work where the
    vocabulary is large, is not computed.
    """
    inner = inner_model(model)
    seen: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach())
        raise _HeadReached

    hook = head.register_forward_pre_hook(stop)
    was_training = inner.training
    inner.eval()
    try:
        for batch in batches_of(model, data, tokenizer):
            seen.clear()
            try:
                with torch.no_grad(), suppress(_HeadReached):
                    inner(**batch)
            except (ValueError, TypeError, IndexError, RuntimeError) as error:
                raise ConfigError(f"convert_head: the model cannot run on the data: {error}") from error
            for x in seen:
                yield real_tokens(x, batch.get("attention_mask"))
    finally:
        hook.remove()
        inner.train(was_training)


def _moment(
    model: nn.Module, dense: nn.Linear, data: Iterable[Sample], tokenizer: Any, config: HeadConfig
) -> tuple[Tensor, Tensor | None]:
    """Return the second moment of the states that a model's head sees, float32, and others to choose rows on.

    The others are None unless the mode needs them, and the same states where the data are a batch or three.
    """
    total, count = torch.zeros(dense.in_features, dense.in_features, dtype=torch.float64), 0
    wanted = max(STATES, STATES_PER_WIDTH * dense.in_features)
    chooses = config.mode == "high_recall"
    fitted: list[Tensor] = []
    unseen: list[Tensor] = []
    with closing(head_states(model, dense, data, tokenizer)) as seen:
        for turn, states in enumerate(seen, start=1):
            if chooses and turn % UNSEEN == 0:
                unseen.append(states)
                continue
            for part in states[: wanted - count].split(CHUNK):
                total += second_moment(part) * len(part)
                count += len(part)
                fitted += [part] if chooses else []
            if count >= wanted:
                break
    if not count:
        raise ConfigError("convert_head: the data gave no token to the head; is it empty?")
    if not chooses:
        return (total / count).float(), None
    chosen = torch.cat(unseen or fitted)
    order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))[:SAMPLE]
    return (total / count).float(), chosen[order].float()


def _calibrate(head: HireHead, states_SD: Tensor) -> None:
    """Choose the least of 64, 128, ... rows whose search finds the wanted share of the states' largest logits."""
    states_SD = states_SD[states_SD.isfinite().all(1)]
    expected = head.choose(states_SD).token
    rows = 64
    while True:
        head.config = replace(head.config, rows=min(rows, head.out_features))
        same = float((head.search(states_SD).token == expected).double().mean())
        if same >= head.config.recall or rows >= head.out_features:
            return
        rows *= 2
