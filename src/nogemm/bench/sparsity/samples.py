"""Texts as a model takes them, and what its FFNs see of them, token after token, text after text.

Legend: N tokens, D width, B texts of a batch, L tokens of its longest.
Reading order: `read_samples`, `as_it_was`, `site_inputs`, `run`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nogemm.convert.activations import Sample, real_tokens
from nogemm.convert.sites import Site, record_sites
from nogemm.decoding.states import TOLERANCE
from nogemm.errors import ConfigError, NotFiniteError
from nogemm.heads import output_embeddings
from nogemm.models.inner import inner_model
from nogemm.models.loading import load_tokenizer
from nogemm.models.texts import accepted, encode
from nogemm.train.sources import texts

MAX_LENGTH = 256
BATCH_TOKENS = 1024  # padded, of a batch, unless one text has more
LOGITS = 2**27  # numbers of a batch's logits, which bound it where the vocabulary is large
_CHECKED = 64  # tokens whose answer is computed a second time
_SHOWN = 32  # texts that are tokenised at once


@dataclass(frozen=True)
class Samples:
    """What a model is run on.

    Attributes:
        batches: keyword arguments of the model, padded behind the texts' ends.
        texts: those in the batches; fewer where samples were mappings, which have none.
        tokens: in all batches, padding left out.
    """

    batches: tuple[dict[str, Tensor], ...]
    texts: tuple[str, ...]
    tokens: int

    def first(self, tokens: int) -> Samples:
        """Return the first batches that have so many tokens, or all."""
        found, count, rows = 0, 0, 0
        while count < len(self.batches) and found < tokens:
            found += _real(self.batches[count])
            rows += len(next(iter(self.batches[count].values())))
            count += 1
        # Mappings have no texts; of a mixture the texts are as many as fit.
        return Samples(self.batches[:count], self.texts[:rows], found)


def read_samples(
    model: nn.Module, data: str | Path | Iterable[Sample], tokenizer: Any, tokens: int, max_length: int = MAX_LENGTH
) -> Samples:
    """Take samples from the data until they have `tokens` tokens.

    Args:
        data: a file as `nogemm.train.sources.texts` reads it, "sample", or an iterable of texts and of mappings of the
            model's keyword arguments.
    Raises:
        DataError: no such file, or no text in it.
        ConfigError: fewer tokens, text without a tokenizer, or something else than texts and mappings.
    """
    if isinstance(data, Mapping) or not isinstance(data, (str, Path, Iterable)):
        raise ConfigError(f"data must be a file, or a list of texts or mappings of tensors, got {data!r:.60}")
    inner = inner_model(model)
    source: Iterator[Any] = texts(data, split=None) if isinstance(data, (str, Path)) else iter(data)
    batches: list[dict[str, Tensor]] = []
    used: list[str] = []
    open_rows: list[Mapping[str, Any]] = []
    found = 0
    while found < tokens and (chunk := list(itertools.islice(source, _SHOWN))):
        for row in _read(chunk, inner, tokenizer, max_length):
            if found >= tokens:
                break
            if isinstance(row, Mapping):
                batches.append(dict(row))
                found += _real(batches[-1])
                continue
            longest = max(len(ids) for ids in (row.fields["input_ids"], *(r["input_ids"] for r in open_rows)))
            if open_rows and longest * (len(open_rows) + 1) > _batch_limit(inner):
                batches.append(_padded(inner, open_rows))
                open_rows = []
            open_rows.append(row.fields)
            used.append(row.text)
            found += len(row.fields["input_ids"])
    if open_rows:
        batches.append(_padded(inner, open_rows))
    if found < tokens:
        raise ConfigError(f"the data has {found:,} tokens, {tokens:,} are needed (tokens=, --tokens)")
    return Samples(tuple(batches), tuple(used), found)


@dataclass(frozen=True)
class _Tokenised:
    """A text and the fields that its tokenizer gives, lists of numbers."""

    text: str
    fields: Mapping[str, Any]


def _read(
    chunk: Sequence[Any], inner: nn.Module, tokenizer: Any, max_length: int
) -> Iterator[_Tokenised | Mapping[str, Tensor]]:
    """Tokenise the texts among samples, in order; texts without a token are left out."""
    for sample in chunk:
        mapping = isinstance(sample, Mapping) and all(isinstance(value, Tensor) for value in sample.values())
        if not mapping and not isinstance(sample, str):
            raise ConfigError(f"data must be texts or mappings of tensors, among them is {sample!r:.60}")
    written = [sample for sample in chunk if isinstance(sample, str) and sample.strip()]
    if written and tokenizer is None:
        raise ConfigError("the data is text, but no tokenizer is known; pass tokenizer=")
    encoded = encode(tokenizer, written, max_length, inner) if written else {}
    place = 0
    for sample in chunk:
        if not isinstance(sample, str):
            yield sample
        elif sample.strip():
            fields = {name: encoded[name][place] for name in encoded}
            place += 1
            if fields["input_ids"]:
                yield _Tokenised(sample, fields)


def _padded(inner: nn.Module, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Pad tokenised texts behind their ends with zeros, which the mask hides, to the inputs that a model takes."""
    longest = max(len(row["input_ids"]) for row in rows)
    full = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    batch = {
        name: torch.tensor([list(row[name]) + [0] * (longest - len(row[name])) for row in full]) for name in full[0]
    }
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        batch["decoder_input_ids"] = batch["input_ids"]
    return accepted(inner, batch)


def _real(batch: Mapping[str, Tensor]) -> int:
    """Count a mapping's tokens: those of its mask, or of its ids, or one for each item."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))


def _batch_limit(inner: nn.Module) -> int:
    """Return how many padded tokens a batch may have, so that its logits stay within half a gigabyte."""
    head = output_embeddings(inner)
    rows = getattr(getattr(head, "weight", None), "shape", [1])[0]
    return min(BATCH_TOKENS, max(1, LOGITS // int(rows)))


def find_tokenizer(model: nn.Module) -> Any:
    """Return the tokenizer of a SentenceTransformer, or the one stored with a model; None where there is none."""
    own = getattr(model, "tokenizer", None)
    if callable(own):
        return own
    path = getattr(getattr(inner_model(model), "config", None), "_name_or_path", "")
    try:
        return load_tokenizer(path) if path else None
    except (OSError, ValueError):
        return None


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode; whatever happens, put back every module's own mode and the padding id."""
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(inner_model(model), "config", None)
    pad = getattr(config, "pad_token_id", None)
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        if config is not None and getattr(config, "pad_token_id", None) != pad:
            config.pad_token_id = pad


def site_inputs(model: nn.Module, sites: Sequence[Site], samples: Samples) -> dict[str, tuple[Tensor, list[int]]]:
    """Run the samples; return {site name: (inputs [N, D] in float32, tokens of each text)}.

    Of a site that one pass uses several times (ALBERT) the last use counts.

    Raises:
        NotFiniteError: a site's input is NaN or infinite.
        ArithmeticError: a site's weights, as they are read, do not give what the model computed.
    """
    inner = inner_model(model)
    kept: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    lengths: dict[str, list[int]] = {site.name: [] for site in sites}
    with torch.no_grad(), record_sites(model, list(kept)) as seen:
        for number, batch in enumerate(samples.batches):
            seen.clear()
            run(inner, batch)
            for site in sites:
                if site.name not in seen:
                    continue
                x, y = seen[site.name]
                mask = batch.get("attention_mask")
                rows_ND = real_tokens(x, mask).float()
                if not bool(rows_ND.isfinite().all()):
                    raise NotFiniteError(f"site {site.name!r}: its input is not finite for sample batch {number}")
                if number == 0:
                    _check(site, x, y)
                kept[site.name].append(rows_ND.clone())
                lengths[site.name] += _lengths(x, mask)
    silent = [name for name, rows in kept.items() if not rows]
    if silent:
        raise ConfigError(f"the model does not use {', '.join(silent)} on this data")
    return {name: (torch.cat(rows), lengths[name]) for name, rows in kept.items()}


def run(inner: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """Run a model on a batch, without a cache of keys and values.

    Raises:
        ConfigError: it cannot run on that.
    """
    try:
        return inner(**batch)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise ConfigError(f"the model cannot run on the data: {error}") from error


def _lengths(x: Tensor, mask: Tensor | None) -> list[int]:
    """Return how many tokens each text of a batch has, as `real_tokens` leaves them."""
    tokens = x.numel() // x.shape[-1]
    if mask is not None and mask.numel() == tokens:
        return [int(count) for count in mask.reshape(len(mask), -1).sum(1)]
    return [tokens // len(x)] * len(x) if x.dim() > 2 else [tokens]


def _check(site: Site, x: Tensor, y: Tensor) -> None:
    """Compute a few tokens' answers by the weights that are measured, and hold them against the model's."""
    x_ND, y_NE = x.reshape(-1, x.shape[-1])[:_CHECKED], y.reshape(-1, y.shape[-1])[:_CHECKED]
    ours_NE = site.dense().float().tokens(x_ND.float())
    limit = TOLERANCE.get(y.dtype, 1e-3) * float(y_NE.float().abs().amax())
    off = float((ours_NE - y_NE.float()).abs().amax())
    if not off <= limit:
        raise ArithmeticError(f"site {site.name!r}: its weights as they are read answer otherwise, by {off:.2g}")
