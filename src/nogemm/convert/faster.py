"""Which layers are slower here than the dense FFNs they would replace: measured, once for every kind of site.

Legend: N tokens of a call, D width.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nogemm.activations import ACTIVATIONS
from nogemm.config import check_choice, check_int
from nogemm.convert._site import Site
from nogemm.convert.discover import Refusal
from nogemm.errors import ConfigError
from nogemm.hardware.cpu import last_level_cache_bytes
from nogemm.layers import FFN, HireConfig
from nogemm.layers._base import PACK_DTYPES
from nogemm.layers.token_table.layer import make_ids_up
from nogemm.ops import native_available
from nogemm.ops._threads import in_passing

FasterAt = int | Literal["auto"] | None

ROUNDS = 9
WORTH_TIMING = 1 << 20  # weights of a dense FFN: what fewer cost a token is little more than the call itself
_FLUSHED = 2  # last-level caches: what is written before a call, so that it finds its weights in memory


def to_time(root: Any, built: Sequence[tuple[Site, FFN]], faster_at: FasterAt) -> list[tuple[Site, FFN]]:
    """Choose the sites whose new layers are timed: all for a number of tokens, none for None.

    For "auto" those that `convert` is asked to make for speed alone: HireFFNs that are the dense function already
    (`select` "active" or "gaussian") in a model that decodes token by token, in evaluation mode and on the CPU, with a
    dense FFN of a million weights or more. All other layers are trained first, or serve calls of many tokens.

    Raises:
        ConfigError: `faster_at` is another word.
    """
    if isinstance(faster_at, str):
        if faster_at != "auto":
            raise ConfigError(f'convert: faster_at must be a number of tokens, "auto" or None, got {faster_at!r}')
        return [pair for pair in built if _is_for_speed(*pair)] if _decodes(root) and native_available() else []
    return [] if faster_at is None else list(built)


def _decodes(root: Any) -> bool:
    can = getattr(root, "can_generate", None)
    alone = not getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    return callable(can) and bool(can()) and alone and not root.training


def _is_for_speed(site: Site, layer: FFN) -> bool:
    config, matrices = layer.config, 3 if site.gated else 2
    return (
        isinstance(config, HireConfig)
        and config.select in ("active", "gaussian")
        and layer.fitted == "exact"
        and site.hidden * site.d_in * matrices >= WORTH_TIMING
        and site.placement()[0].type == "cpu"
    )


def slower_sites(
    built: Sequence[tuple[Site, FFN]], inputs: Mapping[str, Tensor], n_tokens: int, dtype: str
) -> list[Refusal]:
    """Name the sites whose new layer, packed, is slower than the dense one, packed alike, for calls of N tokens.

    Sites of equal shape and config are timed once. A layer that takes what fires (`select="active"`) is timed on
    activations if there are any, else as if its `keep` were right. An FFN whose activation is none of nogemm's is not
    timed and counts as slower than nothing.

    Args:
        built: sites and their new layers.
        inputs: {site name: activations [tokens, D]}, where there are any.
        dtype: that both are packed in.
    Raises:
        ConfigError: no token, or an unknown dtype.
    """
    check_int("convert", "faster_at", n_tokens, 1)
    check_choice("convert", "timed_in", dtype, PACK_DTYPES)
    known: dict[object, tuple[float, float]] = {}
    found = []
    for site, layer in built:
        if site.activation not in ACTIVATIONS:
            continue
        kind = (layer.config, site.shape)
        if kind not in known:
            x_ND = _tokens(site, inputs.get(site.name), n_tokens)
            ours = _twin(site, layer, measured=site.name in inputs).pack(dtype)
            known[kind] = times(ours, site.dense().float().eval().pack(dtype), x_ND)
        ours_us, dense_us = known[kind]
        if ours_us > dense_us:
            said = f"{n_tokens} token{'s' * (n_tokens > 1)}"
            reason = (
                f"for {said} a {type(layer).__name__} in {dtype} takes {ours_us:,.0f} us here, the dense FFN "
                f"{dense_us:,.0f} us; with faster_at=None it is converted all the same"
            )
            found.append(Refusal(site.name, type(site.owner).__name__, reason))
    return found


def times(ours: nn.Module, dense: nn.Module, x_ND: Tensor) -> tuple[float, float]:
    """Return the median microseconds of two modules, called in turn on tokens, weights and tokens not in a cache."""
    flush = torch.zeros(_FLUSHED * last_level_cache_bytes() // 4)
    taken: tuple[list[float], list[float]] = ([], [])

    def work() -> None:
        with torch.inference_mode():
            for turn in range(ROUNDS + 1):  # the first is not counted
                for module, kept in zip((ours, dense), taken, strict=True):
                    flush.add_(1.0)
                    start = time.perf_counter()
                    module(x_ND)
                    if turn:
                        kept.append(1e6 * (time.perf_counter() - start))

    in_passing(work)
    return statistics.median(taken[0]), statistics.median(taken[1])


def _tokens(site: Site, x: Tensor | None, n_tokens: int) -> Tensor:
    if x is None or not len(x):
        return torch.randn(n_tokens, site.d_in, generator=torch.Generator().manual_seed(0))
    return x[torch.arange(n_tokens) % len(x)].float()


def _twin(site: Site, layer: FFN, *, measured: bool) -> FFN:
    """Return a copy to time: without activations, one that computes as many neurons as its config expects."""
    config = layer.config
    if not measured and isinstance(config, HireConfig) and config.select == "active":
        twin: FFN = replace(config, select="topk").make(site.shape)
        twin.fit_dense(site.dense().float())
        return twin.eval()
    own = copy.deepcopy(layer).float().eval()
    make_ids_up(own)
    return own
