"""Compute-lite feed-forward layers and their dense baselines: config, module and packed twin of each."""

from nogemm.activations import ACTIVATIONS
from nogemm.layers._base import FFN, PACK_DTYPES, PackedFFN
from nogemm.layers.dense import DenseConfig, DenseFFN
from nogemm.layers.hire import HireConfig, HireFFN
from nogemm.layers.hire.report import HireReport
from nogemm.layers.leaf_tree import LeafTreeConfig, LeafTreeFFN
from nogemm.layers.linear import LinearConfig, LinearFFN
from nogemm.layers.lookup import LookupConfig, LookupFFN
from nogemm.layers.mongoose import MongooseConfig, MongooseFFN
from nogemm.layers.no import NoConfig, NoFFN
from nogemm.layers.shuffle import ShuffleConfig, ShuffleFFN
from nogemm.layers.slide import SlideConfig, SlideFFN
from nogemm.layers.sum import SumConfig, SumFFN
from nogemm.layers.switch import SwitchConfig, SwitchFFN
from nogemm.layers.token_table import TokenTableConfig, TokenTableFFN
from nogemm.layers.tree import TreeConfig, TreeFFN
from nogemm.layers.yoso import YosoConfig, YosoFFN

__all__ = [
    "ACTIVATIONS",
    "FFN",
    "PACK_DTYPES",
    "DenseConfig",
    "DenseFFN",
    "HireConfig",
    "HireFFN",
    "HireReport",
    "LeafTreeConfig",
    "LeafTreeFFN",
    "LinearConfig",
    "LinearFFN",
    "LookupConfig",
    "LookupFFN",
    "MongooseConfig",
    "MongooseFFN",
    "NoConfig",
    "NoFFN",
    "PackedFFN",
    "ShuffleConfig",
    "ShuffleFFN",
    "SlideConfig",
    "SlideFFN",
    "SumConfig",
    "SumFFN",
    "SwitchConfig",
    "SwitchFFN",
    "TokenTableConfig",
    "TokenTableFFN",
    "TreeConfig",
    "TreeFFN",
    "YosoConfig",
    "YosoFFN",
]
