"""Hypothesis strategies: every registered layer with any of its choices, and the FFN that it replaces.

A kind's fields are read off its config, so a new kind or a new choice joins by itself.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from nogemm.config import LayerConfig, ProjectionConfig, layer_class
from nogemm.errors import ConfigError
from nogemm.layers import FFN
from nogemm.layers.token_table.layer import make_ids_up
from nogemm.projections import (
    AcdcConfig,
    BHConfig,
    DenseProjectionConfig,
    HadamardChainConfig,
    LowRankConfig,
    RandomHadamardConfig,
    ShuffleProjectionConfig,
)
from nogemm.shape import FFNShape
from nogemm.testing.cases import KINDS

BLOCKS = st.sampled_from([1, 2, 4, 8, 16])
# Of whole numbers whose usual sizes would make a test slow, or that a layer of random sizes rarely takes.
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "bits": st.integers(1, 6),
    "block": BLOCKS,
    "depth": st.integers(0, 4),
    "neighbours": st.sampled_from([1, 1, 2, 4]),
    "tables": st.integers(1, 24),
    "vocabulary": st.just(16),
}
PROJECTIONS: st.SearchStrategy[ProjectionConfig] = st.one_of(
    st.builds(
        BHConfig, rounds=st.integers(1, 3), block=BLOCKS, residual=st.sampled_from([None, 0.7]), bias=st.booleans()
    ),
    st.just(DenseProjectionConfig()),
    st.builds(AcdcConfig, depth=st.integers(1, 2)),
    st.builds(HadamardChainConfig, depth=st.integers(1, 2)),
    st.just(RandomHadamardConfig()),
    st.builds(LowRankConfig, rank=st.integers(1, 8)),
    st.builds(ShuffleProjectionConfig, block=BLOCKS),
)


@dataclass(frozen=True)
class Case:
    """A config, and the dense FFN in whose place its layer is put."""

    config: LayerConfig[Any]
    shape: FFNShape

    def build(self, seed: int = 0) -> FFN:
        """Make the layer, with no parameter that is all zeros."""
        torch.manual_seed(seed)
        try:
            layer = self.config.make(self.shape).eval().requires_grad_(False)
        except ConfigError:  # its sizes do not fit the widths, and it said so
            assume(False)
            raise
        make_ids_up(layer)
        for parameter in layer.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return layer


@st.composite
def configs(draw: st.DrawFn, kind: str) -> LayerConfig[Any]:
    """Draw a config of one kind; combinations that it refuses are drawn anew."""
    cls = layer_class(kind)
    hints = typing.get_type_hints(cls)
    if kind == "sum":
        values: dict[str, Any] = {"terms": tuple(draw(configs(term)) for term in draw(_TERMS))}
    else:
        values = {field.name: draw(_values(field, hints[field.name])) for field in dataclasses.fields(cls)}
    try:
        return cls(**{name: value for name, value in values.items() if value is not ...})
    except ConfigError:
        assume(False)
        raise


_TERMS = st.lists(st.sampled_from(["dense", "lookup", "tree", "linear", "no"]), min_size=2, max_size=3)


def _values(field: dataclasses.Field[Any], hint: Any) -> st.SearchStrategy[Any]:
    """Say what a field may be; `...` leaves it at its default."""
    parts = list(typing.get_args(hint) or (hint,))
    words = _words(hint)
    if words:
        return st.sampled_from(words)
    if bool in parts:
        return st.booleans()
    if int in parts:
        number = NUMBERS.get(field.name, st.integers(1, 9))
        return st.one_of(st.none(), number) if type(None) in parts and field.name not in NUMBERS else number
    if ProjectionConfig in parts:
        return st.one_of(st.none(), PROJECTIONS) if type(None) in parts else PROJECTIONS
    return st.just(...)


def _words(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    found = [word for part in typing.get_args(hint) for word in _words(part)]
    return [*found, None] if found and type(None) in typing.get_args(hint) else found


def shapes() -> st.SearchStrategy[FFNShape]:
    """Draw the shape of a dense FFN, odd widths mostly."""
    return st.builds(
        FFNShape,
        d_in=st.integers(1, 70),
        d_out=st.integers(8, 140),
        hidden=st.integers(12, 90),
        activation=st.sampled_from(["relu", "gelu", "silu"]),
        gated=st.booleans(),
    )


def cases(kind: str | None = None) -> st.SearchStrategy[Case]:
    """Draw a layer of one kind, or of any."""
    kinds = st.sampled_from(sorted(KINDS)) if kind is None else st.just(kind)
    return st.builds(Case, kinds.flatmap(configs), shapes())
