"""Run a model on texts and keep the inputs of its FFNs, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.sites import Site, record_sites
from nogemm.convert.token_ids import noted_ids
from nogemm.errors import ConfigError
from nogemm.models.inner import inner_model
from nogemm.models.loading import load_tokenizer
from nogemm.models.texts import batch_of

WINDOW, TOGETHER = 128, 16  # texts that are sorted by length, and of these, texts in a batch
MAX_LENGTH = 256
MAX_TOKENS = 65_536
MAX_BYTES = 512 * 2**20

Sample = str | Mapping[str, Tensor]


def collect_inputs(
    model: nn.Module,
    chosen: Sequence[Site],
    data: Iterable[Sample],
    tokenizer: Any = None,
    ids: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return {site name: inputs [N, d_in]} in fp32, padding left out.

    Args:
        data: texts, or mappings of keyword arguments for the model (images, ready token ids).
        tokenizer: default: the SentenceTransformer's own, or the one stored with the model.
        ids: filled with {site name: token ids [N]} of the same tokens.
    Raises:
        ConfigError: no tokenizer is found, the data holds no token, or no token ids though they are asked for.
    Cost: forward passes until 65,536 tokens or 512 MB are kept, whatever the data's size.
    """
    width = sum(site.d_in for site in chosen)
    limit = max(1, min(MAX_TOKENS, MAX_BYTES // (4 * width)))
    kept: dict[str, list[Tensor]] = {site.name: [] for site in chosen}
    inner = inner_model(model)
    was_training = inner.training
    inner.eval()
    tokens = 0
    try:
        with torch.no_grad(), record_sites(inner, list(kept)) as seen, _noting(inner, chosen, ids) as noted:
            for batch in batches_of(model, data, tokenizer):
                seen.clear()
                inner(**batch)
                counts = []
                for name, (x, _) in seen.items():
                    rows = real_tokens(x, batch.get("attention_mask"))[: limit - tokens].float()
                    kept[name].append(rows)
                    counts.append(rows.shape[0])
                    if ids is not None:
                        own = _own_ids(noted[name], name, batch.get("attention_mask"))
                        ids[name] = torch.cat((ids.get(name, own[:0]), own[: len(rows)]))
                # A model that routes tokens may show its sites different numbers; the largest decides when to stop.
                tokens += max(counts, default=0)
                if tokens >= limit:
                    break
    finally:
        inner.train(was_training)
    empty = [name for name, rows in kept.items() if not sum(r.shape[0] for r in rows)]
    if empty:
        raise ConfigError(f"the data gave no token to {', '.join(empty)}; is it empty?")
    return {name: torch.cat(rows) for name, rows in kept.items()}


@contextmanager
def _noting(inner: nn.Module, chosen: Sequence[Site], ids: object) -> Iterator[dict[str, Tensor | None]]:
    """Note each site's ids within the block, if they are asked for."""
    if ids is None:
        yield {}
        return
    with noted_ids(inner, chosen) as noted:
        yield noted


def _own_ids(noted: Tensor | None, name: str, mask: Tensor | None) -> Tensor:
    if noted is None:
        raise ConfigError(f"the data gives {name} no token ids (inputs_embeds?), which a token table needs")
    return real_tokens(noted.unsqueeze(-1), mask).flatten()


def batches_of(model: nn.Module, data: Iterable[Sample], tokenizer: Any) -> Iterator[dict[str, Tensor]]:
    """Yield the model's keyword arguments for samples, texts in batches; `tokenizer` as in `collect_inputs`."""
    if isinstance(data, (str, Mapping)):
        one = "text" if isinstance(data, str) else "mapping"
        raise ConfigError(f"data must be a list of {one}s, not one {one}")
    try:
        items = iter(data)
    except TypeError:
        raise ConfigError(f"data must be texts or mappings of tensors, got {data!r}") from None
    inner = inner_model(model)
    device = next(inner.parameters()).device
    waiting: list[str] = []
    for sample in items:
        if not _is_sample(sample):
            raise ConfigError(f"data must be texts or mappings of tensors, among them is {sample!r:.60}")
        if isinstance(sample, str):
            tokenizer = tokenizer or _find_tokenizer(model)
            waiting.append(sample)
        else:
            yield {key: value.to(device) for key, value in sample.items()}
        if len(waiting) == WINDOW:
            yield from _text_batches(inner, waiting, tokenizer, device)
            waiting = []
    yield from _text_batches(inner, waiting, tokenizer, device)


def _text_batches(inner: Any, texts: list[str], tokenizer: Any, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield batches of texts of like length: otherwise most of their positions would be padding."""
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), TOGETHER):
        batch = batch_of(tokenizer, texts[start : start + TOGETHER], MAX_LENGTH, inner)
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            batch["decoder_input_ids"] = batch["input_ids"]
        yield {key: value.to(device) for key, value in batch.items()}


def _is_sample(sample: object) -> bool:
    if isinstance(sample, Mapping):
        return all(isinstance(value, Tensor) for value in sample.values())
    return isinstance(sample, str)


def _find_tokenizer(model: nn.Module) -> Any:
    own = getattr(model, "tokenizer", None)
    if callable(own):
        return own
    path = getattr(getattr(inner_model(model), "config", None), "_name_or_path", "")
    if not path:
        raise ConfigError("data is text, but the model has no stored tokenizer; pass tokenizer=")
    try:
        return load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer found at {path!r}; pass tokenizer=") from error


def real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Flatten to [tokens, width], without padding where the mask describes x's leading dimensions."""
    flat = x.reshape(-1, x.shape[-1])
    if mask is None or mask.numel() != flat.shape[0]:
        return flat
    return flat[mask.reshape(-1).bool()]
