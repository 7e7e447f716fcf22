"""A sum of layers: what its terms answer added up, starts of later terms, words on a command line, tables, export."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import nogemm
from nogemm.config import layer_config, parse_layer
from nogemm.errors import ConfigError
from nogemm.layers import DenseFFN, LookupFFN, SumFFN
from nogemm.layers.token_table.layer import make_ids_up
from nogemm.projections import BHConfig
from nogemm.testing.cases import KINDS
from nogemm.testing.compare import check_equal

D, HIDDEN = 16, 48
CORE = nogemm.DenseConfig(hidden=8)
REST = nogemm.LookupConfig(tables=12, bits=4, projection=BHConfig(rounds=2, block=8))
BOTH = nogemm.SumConfig(terms=(CORE, REST))


def build(config: nogemm.SumConfig = BOTH) -> SumFFN:
    return config.build(D, hidden=HIDDEN).eval().requires_grad_(False)


def dense() -> DenseFFN:
    return nogemm.DenseConfig().build(D, hidden=HIDDEN).eval().requires_grad_(False)


def left(layer: Any, source: DenseFFN, x: Tensor) -> float:
    """Return the share of the dense answers' variance that a layer leaves."""
    wanted = source(x)
    return float((layer(x) - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_the_answer_is_the_terms_added_up() -> None:
    layer, x = build(), torch.randn(2, 30, D)
    first, second = layer.layers
    check_equal("sum", layer(x), first(x) + second(x))
    assert not torch.equal(layer(x), first(x))
    for dtype in ("fp32", "bf16", "int8"):
        packed = layer.pack(dtype)
        check_equal(dtype, packed(x), first.pack(dtype)(x) + second.pack(dtype)(x))
    three = build(nogemm.SumConfig(terms=(CORE, REST, nogemm.NoConfig())))
    three.layers[2].get_parameter("bias").fill_(5.0)
    torch.testing.assert_close(three(x), three.layers[0](x) + three.layers[1](x) + 5.0)


def test_cost_and_groups_are_those_of_the_terms() -> None:
    layer = build().requires_grad_(True)
    first, second = layer.layers
    assert layer.cost(7) == first.cost(7) + second.cost(7)
    assert layer.row_bytes(7) == second.row_bytes(7) > 0
    groups = layer.optimiser_groups()
    assert [id(p) for p in groups["tables"]] == [id(p) for p in second.table_parameters()]
    assert [id(p) for p in groups["projection"]] == [id(p) for p in second.projection_parameters()]
    assert len(groups["other"]) == len(list(layer.parameters())) - 1 - len(groups["projection"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sum"])
def test_every_kind_can_be_a_later_term(kind: str) -> None:
    source, config = dense(), nogemm.SumConfig(terms=(nogemm.DenseConfig(), KINDS[kind]))
    layer, x = build(config), torch.randn(5, D)
    make_ids_up(layer)
    assert layer.fit_dense(source) == "exact"
    torch.testing.assert_close(layer(x), source(x))


def test_a_later_term_is_fitted_to_what_the_former_leave() -> None:
    source, x = dense(), torch.randn(2000, D)
    layer = build()
    alone = CORE.build(D, hidden=HIDDEN).eval().requires_grad_(False)
    assert alone.fit_activations(source, x) == "closed-form"
    assert layer.fit_activations(source, x) == "closed-form"
    for key, value in alone.state_dict().items():
        check_equal(key, layer.layers[0].state_dict()[key], value)
    assert left(layer, source, x) < 0.9 * left(alone, source, x)
    wrong = copy.deepcopy(layer)
    wrong.layers[1].fit_activations(source, x)  # fitted to all of the answers, not to what is left
    assert left(wrong, source, x) > left(alone, source, x)


def test_without_texts_a_later_term_answers_zero() -> None:
    source, x = dense(), torch.randn(50, D)
    layer = build()
    assert layer.fit_dense(source) == "closed-form"
    assert not layer.layers[1](x).any()
    check_equal("first", layer(x), layer.layers[0](x))


def test_solving_goes_from_term_to_term() -> None:
    x = torch.randn(1500, D)
    y = torch.tanh(x @ torch.randn(D, D))
    layer = build(nogemm.SumConfig(terms=(REST, nogemm.LookupConfig(tables=20, bits=4, projection=BHConfig(block=8)))))
    layer.start_from_mean(y.mean(0))
    check_equal("mean", layer(x[:1])[0], y.mean(0))
    part = layer.layers[0].solve(x, y)
    assert part is not None
    share = layer.solve(x, y)
    assert share is not None
    assert share < part
    assert float((layer(x) - y).square().sum() / (y - y.mean(0)).square().sum()) == pytest.approx(share, rel=1e-4)
    assert build(nogemm.SumConfig(terms=(CORE, CORE))).solve(x, y) is None


def test_tables_of_terms_are_compressed_and_come_back() -> None:
    layer, x = build(), torch.randn(40, D)
    before = layer(x)
    assert layer.storage == "fp32"
    layer.compress("int8")
    assert (layer.storage, layer.config.terms[1].storage) == ("int8", "int8")  # type: ignore[attr-defined]
    again = layer_config(layer.config.to_dict()).build(D, hidden=HIDDEN).eval()
    again.load_state_dict(layer.state_dict())
    check_equal("loaded", again(x), layer(x))
    layer.decompress()
    assert layer.storage == "fp32"
    torch.testing.assert_close(layer(x), before, atol=0.02, rtol=0.02)
    with pytest.raises(ConfigError, match="compress: no term of this SumFFN has tables"):
        build(nogemm.SumConfig(terms=(CORE, CORE))).compress()


def test_gradients_of_rows_alone_are_asked_of_the_terms() -> None:
    layer = build(nogemm.SumConfig(terms=(CORE, nogemm.TreeConfig(depth=3))))
    assert not layer.row_sparse
    layer.row_sparse = True
    assert layer.layers[1].row_sparse
    layer.requires_grad_(True)
    layer(torch.randn(2, D)).sum().backward()
    gradient = layer.layers[1].get_parameter("weight_out").grad
    assert gradient is not None
    assert gradient.is_sparse


def test_a_sum_routes_nothing_itself() -> None:
    for layer in (build(), build().pack()):
        with pytest.raises(ConfigError, match="route each of its terms"):
            layer.route(torch.randn(3, D))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ((), "two layer configs or more"),
        ((CORE,), "two layer configs or more"),
        (CORE, "two layer configs or more"),
        ((CORE, "lookup"), "each of terms must be a layer config, got 'lookup'"),
        ((CORE, BOTH), "one of terms is a sum itself"),
    ],
)
def test_terms_that_are_none_are_named(terms: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nogemm.SumConfig(terms=terms)


def test_layers_that_never_answer_zero_are_no_later_terms() -> None:
    for later in (nogemm.SwitchConfig(experts=2, faithful=True), nogemm.YosoConfig(hashes=4, bits=3, unit=True)):
        with pytest.raises(ConfigError, match="no weights make it zero"):
            build(nogemm.SumConfig(terms=(CORE, later))).fit_dense(dense())


def test_words_of_a_command_line() -> None:
    words = ["dense.hidden=8", "lookup.tables=12", "lookup.projection.block=32"]
    expected = nogemm.SumConfig(
        terms=(CORE, nogemm.LookupConfig(tables=12, projection=BHConfig(block=32))),
    )
    assert parse_layer("dense+lookup", words) == expected
    assert parse_layer("sum", ["terms=dense+lookup", *words]) == expected
    assert parse_layer("dense", ["hidden=8"]) == CORE
    twice = parse_layer("lookup+dense+lookup", ["lookup1.tables=3", "lookup2.tables=5"])
    assert isinstance(twice, nogemm.SumConfig)
    assert [getattr(term, "tables", None) for term in twice.terms] == [3, None, 5]


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("sum", [], "name its terms, such as dense\\+lookup"),
        ("sum", ["terms=dense"], "name its terms"),
        ("dense+magic", [], "unknown layer kind 'magic'"),
        ("dense+lookup", ["tables=3"], "'tables=3': dense\\+lookup is a sum; say which of dense, lookup is meant"),
        ("dense+lookup", ["tree.depth=3"], "say which of dense, lookup"),
        ("lookup+lookup", ["lookup.tables=3"], "lookup1, lookup2"),
        ("dense+lookup", ["lookup.tabels=3"], "LookupConfig has no field 'tabels'"),
        ("dense+sum", [], "two layer configs or more"),
    ],
)
def test_words_that_fit_nothing_are_named(method: str, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_layer(method, words)


def test_a_lookup_of_a_sum_is_the_lookup_alone() -> None:
    layer = build()
    second = layer.layers[1]
    assert isinstance(second, LookupFFN)
    assert second.site is None
    assert layer.computes_in("int8") == "int16" or layer.layers[0].cost(1).flops > second.cost(1).flops
