"""Replace the FFNs of a model in place."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from nogemm.config import LayerConfig
from nogemm.convert._families import is_listed
from nogemm.convert.activations import Sample, collect_inputs
from nogemm.convert.checkpoint import attach
from nogemm.convert.discover import in_words
from nogemm.convert.faster import FasterAt, slower_sites, to_time
from nogemm.convert.fitted import mark_random
from nogemm.convert.report import ConversionReport, SiteReport
from nogemm.convert.sites import Refusal, Site, Survey, installed, remember, site_names, survey
from nogemm.convert.token_ids import check_order, connect, start_alone, vocabulary_of
from nogemm.cost import Cost
from nogemm.errors import ConfigError
from nogemm.layers import ACTIVATIONS, FFN, DenseConfig
from nogemm.layers.token_table import given
from nogemm.models.inner import inner_model

Layers = str | int | Sequence[str | int]


def convert(
    model: nn.Module,
    config: LayerConfig | Mapping[str, LayerConfig],
    layers: Layers = "all",
    data: Iterable[Sample] | None = None,
    *,
    tokenizer: Any = None,
    faster_at: FasterAt = "auto",
    timed_in: str = "int8",
) -> ConversionReport:
    """Replace FFNs of a transformers model (or of the one inside a SentenceTransformer) in place.

    The new layers start from the dense weights where the method allows it, and with `data` from a closed-form fit to
    the dense FFNs' answers. Dropout, residual and LayerNorm stay the model's own.

    Args:
        config: one config for all chosen sites, or {glob on site names: config}, of which the first match counts.
        layers: "all", site indices in model order (encoder before decoder), or globs on site names.
        data: texts, or mappings of the model's keyword arguments, for closed-form fits.
        tokenizer: for the texts; default: the one stored with the model.
        faster_at: tokens a call, 1 for decoding. A site whose new layer is measured to be slower here than its dense
            FFN for such calls stays dense, and the report says so. None: nothing is measured, all are converted.
            "auto": 1 where conversion is for speed alone, None elsewhere: HireFFNs that need no training (`select`
            "active" or "gaussian") for dense FFNs of 2^20 weights or more, in a decoder in evaluation mode on the CPU.
        timed_in: "fp32", "bf16" or "int8", what both are packed in for that.
    Returns:
        what changed, one entry per site.
    Raises:
        ConfigError: the model has no site, a name or glob matches nothing, or a chosen site is converted already, has a
            wrapped or quantised matrix, or is a mixture of experts; a token table's site sees no token ids; or
            `faster_at` or `timed_in` is none. The model is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"convert: expected a model, got {model!r}; load it first, for example by AutoModel")
    if isinstance(config, Mapping) and not config:
        raise ConfigError("config: the mapping is empty")
    found = survey(model)
    chosen = _choose(model, config, layers, found)
    root, reading = inner_model(model), [site for site, cfg in chosen if cfg.reads_ids]
    if reading:
        size = vocabulary_of(root)
        chosen = [(site, cfg.for_vocabulary(size)) for site, cfg in chosen]
        check_order(root, reading)
    ids: dict[str, torch.Tensor] = {}
    inputs: dict[str, torch.Tensor] = {}
    if data is not None:
        inputs = collect_inputs(model, [site for site, _ in chosen], data, tokenizer, ids if reading else None)
    built = [(site, *_build(site, cfg, inputs.get(site.name), ids.get(site.name))) for site, cfg in chosen]
    start_alone(root, [(site, layer) for site, layer, _ in built])
    slower: list[Refusal] = []
    start = time.perf_counter()
    timed = to_time(root, [(site, layer) for site, layer, _ in built], faster_at)
    if timed and faster_at is not None:
        slower = slower_sites(timed, inputs, 1 if isinstance(faster_at, str) else faster_at, timed_in)
        left = {refusal.name for refusal in slower}
        built = [entry for entry in built if entry[0].name not in left]
    seconds = time.perf_counter() - start if timed else 0.0
    reports = []
    for site, layer, before in built:
        site.install(layer)
        if layer.fitted == "random":
            mark_random(layer)
        reports.append(SiteReport(site.name, layer.config, site.shape, before, layer.cost(1), layer.fitted))
    for site in found.open:  # those left dense too: a checkpoint and copies keep all names without another search
        if not is_listed(type(site.owner).__name__, site.adapter):
            remember(site.owner, site.adapter)
    connect(root)
    attach(root)
    return ConversionReport(tuple(reports), (*found.blocked, *found.refused), tuple(slower), seconds)


def _build(site: Site, config: LayerConfig, x: torch.Tensor | None, ids: torch.Tensor | None) -> tuple[FFN, Cost]:
    """Build and fit the layer for a site, in fp32, to tokens x with their ids; return it with the dense FFN's cost."""
    before = dense_cost(site)
    device, dtype = site.placement()
    layer = site.empty_layer(config)
    if x is None and site.activation not in ACTIVATIONS and not isinstance(config, DenseConfig):
        return layer, before  # nothing to start from: our dense layer cannot express this activation
    dense = site.dense()
    if dtype != torch.float32:
        layer, dense = layer.float(), dense.float()
    with nullcontext() if ids is None else given(ids):
        layer.fit_dense(dense) if x is None else layer.fit_activations(dense, x)
    if dtype != torch.float32:
        layer = layer.to(dtype)
    if site.shape.sparsity and not layer.has_cutoff and layer.fitted == "exact":
        layer.fitted = "closed-form"  # the neurons are the dense network's, its cutoff is not
    return layer.to(device), before


def dense_cost(site: Site) -> Cost:
    parameters = [p for path in site.adapter.matrices for p in site.owner.get_submodule(path).parameters()]
    macs = site.hidden * (site.d_in * (2 if site.gated else 1) + site.d_out)
    return Cost(
        2.0 * macs,
        float(sum(p.numel() * p.element_size() for p in parameters)),
        sum(p.numel() for p in parameters),
    )


def _choose(
    model: nn.Module, config: LayerConfig | Mapping[str, LayerConfig], layers: Layers, found: Survey
) -> list[tuple[Site, LayerConfig]]:
    """Resolve `layers` and `config` to open sites, or say what is wrong before anything is touched."""
    names = site_names(model)
    if not names:
        raise ConfigError(_no_site(model, found.refused))
    wanted = select_sites(names, layers)
    table = config if isinstance(config, Mapping) else {"*": config}
    for glob, value in table.items():
        if not isinstance(value, LayerConfig):
            raise ConfigError(f"convert: expected a layer config such as nogemm.LookupConfig(), got {value!r}")
        if not any(fnmatchcase(name, glob) for name in wanted):
            raise ConfigError(_no_match(glob, names))
    picks = {name: next((c for g, c in table.items() if fnmatchcase(name, g)), None) for name in wanted}
    taken = installed(model)
    twice = [name for name, value in picks.items() if value is not None and name in taken]
    if twice:
        left = [name for name in names if name not in taken]
        raise ConfigError(
            f"convert: converted already: {', '.join(twice)}. "
            + (f"Still dense: {', '.join(left)}" if left else "No site of this model is dense any more")
        )
    blocked = [refusal for refusal in found.blocked if picks.get(refusal.name) is not None]
    if blocked:
        raise ConfigError(
            f"convert: {len(blocked)} of the chosen sites cannot be converted as they are: "
            f"{'; '.join(in_words(blocked))}. Or choose others with layers="
        )
    open_sites = {site.name: site for site in found.open}
    return [(open_sites[name], value) for name, value in picks.items() if value is not None]


def select_sites(names: list[str], layers: Layers) -> list[str]:
    """Resolve "all", indices or globs to site names, in model order.

    Raises:
        ConfigError: an index is out of range, or a glob matches nothing; the message lists the names.
    """
    if isinstance(layers, str) and layers == "all":
        return names
    words = [layers] if isinstance(layers, (str, int)) else list(layers)
    chosen: set[str] = set()
    for word in words:
        if isinstance(word, bool) or not isinstance(word, (str, int)):
            raise ConfigError(f'layers must be "all", indices or globs, got {word!r}')
        if isinstance(word, int):
            if not -len(names) <= word < len(names):
                raise ConfigError(f"layers: index {word} is out of range, the model has {len(names)} sites")
            chosen.add(names[word])
            continue
        matches = [name for name in names if fnmatchcase(name, word)]
        if not matches:
            raise ConfigError(_no_match(word, names))
        chosen.update(matches)
    if not chosen:
        raise ConfigError("layers: the list is empty")
    return [name for name in names if name in chosen]


def _no_match(glob: str, names: list[str]) -> str:
    return f"layers: {glob!r} matches no site to convert. The sites are: {', '.join(names)}"


def _no_site(model: nn.Module, refusals: Sequence[Refusal]) -> str:
    inner = inner_model(model)
    if not refusals:
        hint = " No module in it has linear layers d -> F -> d."
    else:
        hint = f" What looks like one is refused: {'; '.join(in_words(refusals))}."
    return (
        f"convert: {type(inner).__name__} has no FFN that nogemm knows or can prove.{hint} Teach it one with "
        'nogemm.register_site("ClassName", up="...", activation="...", down="...")'
    )
