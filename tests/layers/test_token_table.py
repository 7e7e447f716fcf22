"""A token table by itself: rows by id, starts, packed rows, and what it says where there are no ids."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import nogemm
from nogemm.errors import ConfigError, ShapeError
from nogemm.layers import PACK_DTYPES, TokenTableFFN
from nogemm.layers.token_table import given
from nogemm.layers.token_table.ids import running_ids
from nogemm.testing.compare import check_equal
from nogemm.train.lazy_adam import LazyAdam

V, D, OUT = 11, 6, 9
IDS = torch.tensor([[3, 0, 3], [10, 7, 0]])


def build(**choices: Any) -> TokenTableFFN:
    layer = nogemm.TokenTableConfig(vocabulary=V, **choices).build(D, OUT).eval()
    with torch.no_grad():
        layer.rows.normal_()
    return layer


def test_each_token_gets_the_row_of_its_id() -> None:
    layer, x = build(), torch.randn(2, 3, D)
    with given(IDS):
        check_equal("rows", layer(x), layer.rows[IDS])
        check_equal("flat", layer(x.reshape(6, D)), layer.rows[IDS.flatten()])
        check_equal("other states", layer(-x), layer(x))
        assert layer.route(x).rows.flatten().tolist() == IDS.flatten().tolist()
    with given(IDS.flip(0)):
        assert not torch.equal(layer(x), layer.rows[IDS])


@pytest.mark.parametrize("dtype", PACK_DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_rows(isa: str, dtype: str, bits: int) -> None:
    layer, x = build(bits=bits), torch.randn(2, 3, D)
    packed = layer.pack(dtype)
    with given(IDS):
        check_equal(dtype, packed(x), layer.rounded(dtype)(x))
        error = (packed(x) - layer(x)).detach().abs().max(-1).values / layer.rows.detach().abs().max(-1).values[IDS]
    step = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.51 / 127 if bits == 8 else 0.51 / 7}[dtype]
    assert float(error.max()) <= step
    assert float(error.max()) > step / 20 or dtype == "fp32"
    stored = packed.get_buffer("rows")
    if dtype == "int8":
        assert (stored.dtype, stored.shape[1]) == ((torch.int8, OUT) if bits == 8 else (torch.uint8, (OUT + 1) // 2))
        assert layer.packed_share("int8") == pytest.approx((OUT * bits / 8 + 4) / (4 * OUT))


def test_means_are_drawn_to_the_mean_of_all() -> None:
    layer = build(prior=2.0)
    ids, y = torch.tensor([4, 4, 4, 6]), torch.tensor([3.0, 6.0, 9.0, 2.0]).unsqueeze(1).expand(4, OUT)
    with given(ids):
        left = layer.solve(torch.zeros(4, D), y)
    mean = 5.0
    expected = {4: (18.0 + 2 * mean) / 5, 6: (2.0 + 2 * mean) / 3, 0: mean}
    for token, row in expected.items():
        torch.testing.assert_close(layer.rows[token].detach(), torch.full((OUT,), row))
    errors = sum((value - expected[token]) ** 2 for token, value in zip([4, 4, 4, 6], [3, 6, 9, 2], strict=True))
    assert left == pytest.approx(errors / sum((value - mean) ** 2 for value in [3, 6, 9, 2]))
    free = build(prior=0.0)
    with given(ids):
        free.solve(torch.zeros(4, D), y)
    torch.testing.assert_close(free.rows[6].detach(), torch.full((OUT,), 2.0))


def test_the_start_is_the_one_asked_for() -> None:
    dense, x = nogemm.DenseConfig().build(D, OUT, hidden=20), torch.randn(6, D)
    with given(IDS.flatten()):
        table = nogemm.TokenTableConfig(vocabulary=V).build(D, OUT)
        assert table.fit_dense(dense) == "random"
        assert not table.rows.any()
        assert table.fit_activations(dense, x) == "closed-form"
        assert table.rows.any()
        zero = nogemm.TokenTableConfig(vocabulary=V, start="zero").build(D, OUT)
        assert zero.fit_activations(dense, x) == "random"
        assert not zero.rows.any()
        both = nogemm.SumConfig(terms=(nogemm.DenseConfig(hidden=5), table.config)).build(D, OUT, hidden=20)
        both.fit_activations(dense, x)
        left = dense(x) - both.layers[0](x)
        means = nogemm.TokenTableConfig(vocabulary=V).build(D, OUT)
        means.solve(x, left)
        torch.testing.assert_close(both.layers[1](x), means(x))
        still = nogemm.SumConfig(terms=(nogemm.DenseConfig(hidden=5), zero.config)).build(D, OUT, hidden=20)
        still.fit_activations(dense, x)
        check_equal("zero", still(x), still.layers[0](x))


def test_gradients_of_the_batch_alone_step_as_all_do() -> None:
    sparse, dense = build(), build()
    dense.load_state_dict(sparse.state_dict())
    sparse.row_sparse = True
    goal = torch.randn(6, OUT)
    optimisers = LazyAdam([sparse.rows], lr=0.1), LazyAdam([dense.rows], lr=0.1)
    for step in range(4):
        with given(IDS.flatten() if step != 2 else IDS.flatten().flip(0)):
            for layer, optimiser in zip((sparse, dense), optimisers, strict=True):
                optimiser.zero_grad()
                (layer(torch.zeros(6, D)) - goal).square().sum().backward()
                optimiser.step()
    assert sparse.rows.grad is not None
    assert sparse.rows.grad.is_sparse
    optimisers[0].settle()
    torch.testing.assert_close(sparse.rows, dense.rows, atol=1e-5, rtol=1e-5)


def test_without_ids_it_says_so() -> None:
    for layer in (build(), build().pack()):
        with pytest.raises(ConfigError, match=r"no call of its model is running. Call the model with input_ids"):
            layer(torch.randn(2, 3, D))
        with given(IDS), pytest.raises(ShapeError, match=r"input_ids of shape \(2, 3\), the layer sees 4 tokens"):
            layer(torch.randn(4, D))
        with given(torch.tensor([V])), pytest.raises(ConfigError, match=r"beyond the 11 rows.*embedding resized"):
            layer(torch.randn(1, D))
    assert running_ids() is None


def test_each_thread_has_its_own_ids() -> None:
    layer, together = build(), threading.Barrier(2)
    found: dict[int, Tensor] = {}

    def work(token: int) -> None:
        with given(torch.full((5,), token)):
            together.wait()
            found[token] = layer(torch.zeros(5, D)).detach()
            together.wait()

    threads = [threading.Thread(target=work, args=(token,)) for token in (2, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for token, y in found.items():
        check_equal(str(token), y, layer.rows[token].expand(5, OUT))


def test_a_pickled_table_is_the_same() -> None:
    layer = build()
    twin = pickle.loads(pickle.dumps(layer))
    with given(IDS):
        check_equal("pickled", twin(torch.zeros(2, 3, D)), layer(torch.zeros(2, 3, D)))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"vocabulary": 0}, "vocabulary must be an integer at least 1"),
        ({"start": "random"}, "start must be one of mean, zero, alone"),
        ({"prior": -1.0}, "prior must be at least 0"),
        ({"bits": 5}, "bits must be 8 or 4, got bits=5"),
    ],
)
def test_values_out_of_range_are_named(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        nogemm.TokenTableConfig(**choices)


def test_by_itself_it_needs_a_vocabulary() -> None:
    with pytest.raises(ConfigError, match="vocabulary=None takes the model's"):
        nogemm.TokenTableConfig().build(D)
    assert nogemm.TokenTableConfig().for_vocabulary(7).vocabulary == 7
    assert nogemm.TokenTableConfig(vocabulary=3).for_vocabulary(7).vocabulary == 3
