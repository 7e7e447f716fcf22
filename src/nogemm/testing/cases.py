"""The shared list of layer cases: shapes, methods and dtypes that tests, benchmarks and checks run over.

Odd on purpose: widths that are no multiple of any vector, one table, one bit, blocks of 1 and of the whole width,
repeats, batches of 0, 1 and one more than a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nogemm.config import LayerConfig, layer_class, layer_kinds
from nogemm.layers import DenseConfig, LookupConfig, TreeConfig
from nogemm.projections import (
    AcdcConfig,
    BHConfig,
    DenseProjectionConfig,
    HadamardChainConfig,
    LowRankConfig,
    RandomHadamardConfig,
    ShuffleProjectionConfig,
)

BATCHES = (0, 1, 2, 7, 33, 129)
THREADS = (1, 2)


@dataclass(frozen=True)
class LookupCase:
    """One LookupFFN to test: its config and widths."""

    name: str
    config: LookupConfig
    d_model: int
    d_out: int


LOOKUP_CASES = (
    LookupCase("plain", LookupConfig(tables=16, bits=8, projection=BHConfig(block=16)), 64, 64),
    LookupCase("padded", LookupConfig(tables=9, bits=5, projection=BHConfig(block=8)), 37, 50),
    LookupCase("repeats", LookupConfig(tables=23, bits=7, projection=BHConfig(block=32, rounds=3)), 48, 33),
    LookupCase("one table", LookupConfig(tables=1, bits=1, projection=BHConfig(block=1, rounds=1)), 5, 1),
    LookupCase("whole block", LookupConfig(tables=4, bits=4, projection=BHConfig(block=16, rounds=2)), 16, 7),
    LookupCase("width one", LookupConfig(tables=3, bits=2, projection=BHConfig(block=1)), 1, 3),
    LookupCase("many bits", LookupConfig(tables=2, bits=16, projection=BHConfig(block=4)), 20, 19),
    LookupCase("residual", LookupConfig(tables=12, bits=6, projection=BHConfig(block=16, residual=0.7)), 64, 96),
    LookupCase("no norm", LookupConfig(tables=8, bits=6, norm=False, projection=BHConfig(block=16)), 40, 24),
    LookupCase(
        "no biases", LookupConfig(tables=8, bits=3, bias=False, projection=BHConfig(block=8, bias=False)), 24, 24
    ),
    LookupCase(
        "order 12", LookupConfig(tables=25, bits=8, projection=BHConfig(rounds=3, block=16, pad="hadamard")), 192, 40
    ),
    LookupCase("order 12 padded", LookupConfig(tables=90, bits=9, projection=BHConfig(pad="hadamard")), 700, 30),
    LookupCase(
        "order 20",
        LookupConfig(tables=30, bits=6, projection=BHConfig(rounds=2, block=8, residual=0.7, pad="hadamard")),
        620,
        33,
    ),
    LookupCase("dense", LookupConfig(tables=11, bits=4, projection=DenseProjectionConfig()), 29, 45),
    LookupCase("sigmoid", LookupConfig(tables=10, bits=7, score="sigmoid", projection=BHConfig(block=32)), 64, 40),
    LookupCase("two neighbours", LookupConfig(tables=10, bits=6, neighbours=2, projection=BHConfig(block=16)), 32, 70),
    LookupCase(
        "four neighbours",
        LookupConfig(tables=6, bits=5, neighbours=4, score="sigmoid", projection=BHConfig(block=16)),
        32,
        17,
    ),
    LookupCase("three neighbours", LookupConfig(tables=6, bits=5, neighbours=3, projection=BHConfig(block=16)), 32, 17),
    LookupCase("rows of four bits", LookupConfig(tables=9, bits=5, row_bits=4, projection=BHConfig(block=8)), 37, 50),
    LookupCase(
        "wide rows of four bits",
        LookupConfig(tables=12, bits=6, row_bits=4, neighbours=2, projection=BHConfig(block=16)),
        32,
        200,
    ),
    LookupCase("rows of eight bits", LookupConfig(tables=8, bits=4, row_bits=8, projection=BHConfig(block=8)), 24, 70),
    LookupCase("acdc", LookupConfig(tables=9, bits=6, projection=AcdcConfig(depth=2)), 40, 21),
    LookupCase("hadamard chain", LookupConfig(tables=12, bits=5, projection=HadamardChainConfig(depth=2)), 37, 30),
    LookupCase("random hadamard", LookupConfig(tables=9, bits=8, projection=RandomHadamardConfig()), 48, 24),
    LookupCase("shuffle", LookupConfig(tables=11, bits=6, projection=ShuffleProjectionConfig(block=12)), 40, 33),
    LookupCase("low rank", LookupConfig(tables=10, bits=5, projection=LowRankConfig(rank=16)), 29, 18),
    LookupCase("minilm", LookupConfig(tables=64, bits=8), 384, 384),
)


@dataclass(frozen=True)
class TreeCase:
    """One TreeFFN: a name for test output, and what to build."""

    name: str
    config: TreeConfig
    d_model: int
    d_out: int


TREE_CASES: tuple[TreeCase, ...] = (
    TreeCase("one tree", TreeConfig(depth=6), 64, 64),
    TreeCase("root only", TreeConfig(depth=0, bias=False), 1, 1),
    TreeCase("odd widths", TreeConfig(trees=3, depth=3, activation="silu"), 37, 19),
    TreeCase("threshold", TreeConfig(trees=2, depth=4, branch="bias", routing="straight_through"), 30, 130),
    TreeCase("relu with a core", TreeConfig(depth=3, core=5, activation="relu", bias=False, out_bias=False), 50, 33),
    TreeCase("annealed", TreeConfig(trees=5, depth=2, core=1, routing="anneal", init="reference"), 16, 48),
)

# One small layer of every registered kind, for what must hold of all of them; a new kind joins by itself.
_SMALL_SETTINGS: dict[str, dict[str, Any]] = {
    "lookup": {"tables": 8, "bits": 4, "projection": BHConfig(rounds=2, block=8)},
    "tree": {"depth": 5},
    "shuffle": {"block": 8},
    "sum": {"terms": (DenseConfig(hidden=9), LookupConfig(tables=4, bits=3, projection=BHConfig(rounds=2, block=8)))},
    "slide": {"bits": 3, "tables": 4},
    "mongoose": {"bits": 3, "tables": 4},
    "token_table": {"vocabulary": 16},
    "yoso": {"hashes": 8, "bits": 4},
    "switch": {"experts": 3},
}
KINDS: dict[str, LayerConfig] = {kind: layer_class(kind)(**_SMALL_SETTINGS.get(kind, {})) for kind in layer_kinds()}
