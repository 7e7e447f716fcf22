"""What may stand in an FFN's place: named offers, each a layer config or a rule that makes one for a shape.

Reading order: `OFFERS`, `offers_for`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nogemm.config import LayerConfig
from nogemm.errors import ConfigError
from nogemm.layers import (
    DenseConfig,
    HireConfig,
    LookupConfig,
    NoConfig,
    SumConfig,
    TokenTableConfig,
    TreeConfig,
)
from nogemm.projections import BHConfig
from nogemm.shape import FFNShape

Rule = Callable[[FFNShape], LayerConfig]
Offers = dict[str, LayerConfig | Rule]
DENSE = "dense"  # the site stays as it is
PLAIN = (DenseConfig, NoConfig)
"""Kinds that are ordinary torch, which every engine runs."""


def _narrow(part: int) -> Rule:
    return lambda shape: DenseConfig(hidden=max(1, shape.neurons(None) // part))


def _lookup(tables: int) -> Rule:
    """LookupFFN as the demo has it, its blocks no wider than the layer."""

    def make(shape: FFNShape) -> LayerConfig:
        block = 1 << min(6, max(0, shape.d_in.bit_length() - 1))
        return LookupConfig(tables=tables, bits=8, neighbours=2, projection=BHConfig(rounds=3, block=block))

    return make


def _narrow_and_table(part: int) -> Rule:
    return lambda shape: SumConfig(terms=(_narrow(part)(shape), TokenTableConfig()))


OFFERS: Offers = {
    "narrow-2": _narrow(2),
    "narrow-4": _narrow(4),
    "narrow-8": _narrow(8),
    "lookup-32": _lookup(32),
    "lookup-64": _lookup(64),
    "lookup-128": _lookup(128),
    "tree": TreeConfig(trees=32, depth=5),
    "hire": HireConfig(keep=0.1),
    "token-table": TokenTableConfig(),
    "narrow-8+table": _narrow_and_table(8),
    "none": NoConfig(),
}
"""Names of what `tune` offers each FFN besides staying dense; narrow-4 has a quarter of the neurons."""


def config_for(offer: LayerConfig | Rule, shape: FFNShape) -> LayerConfig:
    """Return the config of an offer for the FFN of a shape."""
    return offer if isinstance(offer, LayerConfig) else offer(shape)


def is_plain(config: LayerConfig) -> bool:
    """Say whether a layer is ordinary torch, and so runs in every engine."""
    return isinstance(config, PLAIN)


def with_table(config: LayerConfig | None) -> LayerConfig:
    """Return a layer with a token table beside it that starts at zero; None stands for the dense FFN."""
    terms: tuple[LayerConfig, ...] = (DenseConfig(),) if config is None else (config,)
    if isinstance(config, SumConfig):
        terms = config.terms
    return SumConfig(terms=(*terms, TokenTableConfig(start="zero")))


def has_table(config: LayerConfig | None) -> bool:
    """Say whether a layer reads token ids already."""
    return config is not None and config.reads_ids


def check_offers(offers: Mapping[str, LayerConfig | Rule]) -> None:
    """Raise ConfigError where a name cannot stand in a candidate's."""
    for name in offers:
        if name == DENSE or not name or any(c in name for c in " ,|@"):
            raise ConfigError(f"tune: an offer needs a name of its own without spaces and commas, got {name!r}")
